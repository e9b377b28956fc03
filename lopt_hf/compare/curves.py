"""Curves of what training runs logged: read, smoothed, averaged over the runs of one method, and plotted."""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from lopt_hf.common.figures import Figure, new_figure
from lopt_hf.common.tables import markdown_table
from lopt_hf.common.upstream.trainers import TRAINER_STATE_NAME

__all__ = ["Curve", "mean_curve", "plot_curves", "read_curve", "smoothed", "to_markdown"]

logger = logging.getLogger(__name__)

Curve = dict[int, float]  # step -> value


def read_curve(output_dir: str, metric: str) -> Curve:
    """Reads a metric that a run has logged, by step.

    Args:
        output_dir: The run's folder, or one of its checkpoints.
        metric: Its name in the log.

    Raises:
        ValueError: If the folder holds no log, or the log does not hold the metric.
    """
    folders = [Path(output_dir)]
    if folders[0].is_dir() and (last := get_last_checkpoint(output_dir)) is not None:
        folders.append(Path(last))  # of a run that has not ended
    # Of a pipeline's stages the last one logs for all
    folders += [stage for folder in folders for stage in sorted(folder.glob("stage-*"), key=_stage_number)[-1:]]
    files = [path for folder in folders if (path := folder / TRAINER_STATE_NAME).is_file()]
    if not files:
        raise ValueError(f"--run {output_dir}: there is no {TRAINER_STATE_NAME}; give the output_dir of a run.")
    try:
        rows = json.loads(files[0].read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--run {output_dir}: {files[0]} is no whole log ({error}); name another folder.") from error
    curve = {row["step"]: row[metric] for row in rows if row.get(metric) is not None}
    if not curve:
        known = ", ".join(sorted({name for row in rows for name in row} - {"step", "epoch"}))
        raise ValueError(f"--metric {metric}: the log of {output_dir} does not have it; choose from {known}.")
    return curve


def _stage_number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def smoothed(curve: Curve, window: int) -> Curve:
    """Returns at each step the mean of the last `window` values."""
    steps, values = list(curve), list(curve.values())
    return {step: statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i, step in enumerate(steps)}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Returns the mean at the steps that all curves have; empty if there are none."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in shared}


def to_markdown(groups: Mapping[str, Sequence[Curve]], metric: str, part: int) -> str:
    """Returns a table of each label's means over its runs' beginnings and ends, and of each run's change.

    Args:
        groups: Curves of the runs by label.
        metric: Their metric.
        part: How many of a run's first and last values count; fewer where these overlap in the shortest run.
    """
    shortest = min(len(curve) for curves in groups.values() for curve in curves)
    part = max(1, min(part, shortest // 2))  # the two parts share no value
    header = [metric, f"first {part}", f"last {part}", "change", "of each run"]
    return markdown_table(header, [_row(label, curves, part) for label, curves in groups.items()], (0, 4))


def _row(label: str, curves: Sequence[Curve], part: int) -> list[str]:
    starts = [statistics.fmean(list(curve.values())[:part]) for curve in curves]
    ends = [statistics.fmean(list(curve.values())[-part:]) for curve in curves]
    if min(map(len, curves)) < 2:  # one value shows no change
        return [label, f"{statistics.fmean(starts):.3f}", "", "", ""]
    rises = [end - start for start, end in zip(starts, ends, strict=True)]
    seeds = ", ".join(f"{rise:+.3f}" for rise in rises)
    start, end, rise = (statistics.fmean(values) for values in (starts, ends, rises))
    return [label, f"{start:.3f}", f"{end:.3f}", f"{rise:+.3f}", seeds]


def plot_curves(groups: Mapping[str, Sequence[Curve]], metric: str, window: int) -> Figure:
    """Plots each label's mean over its runs, with each run behind it; runs that share no step have no mean.

    Args:
        groups: Curves of the runs by label.
        metric: Their metric.
        window: How many logged values are averaged.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    for number, (label, curves) in enumerate(groups.items()):
        color = f"C{number}"
        for curve in curves if len(curves) > 1 else ():
            axes.plot(*zip(*smoothed(curve, window).items(), strict=True), color=color, alpha=0.3, linewidth=0.8)
        mean = smoothed(mean_curve(curves), window)
        if not mean:
            logger.warning("label %r: its runs logged %s at no step in common, so they have no mean.", label, metric)
        what = f"mean of {len(curves)}" if mean else f"{len(curves)} runs without a mean"
        name = f"{label} ({what})" if len(curves) > 1 else label
        axes.plot(
            list(mean), list(mean.values()), color=color, linewidth=1.8, label=name
        )  # in the legend even if empty
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(metric + (f", mean of {window}" if window > 1 else ""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
