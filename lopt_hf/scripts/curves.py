"""Draw what training runs logged, as curves in one plot: runs of one label as their mean, with each run behind it.

```bash
lopt-hf curves --run LoPT=out/lopt_k2 --run end-to-end=out/e2e --metric reward --output reward.png
lopt-hf curves --run LoPT=out/a --run LoPT=out/b --metric eval_rewards/accuracies --smooth 5 --output accuracy.png
```

It also prints, for each label, the metric's mean over the first and the last part of the runs. Needs the extra `demo`,
which brings matplotlib.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

__all__ = ["main", "make_parser", "read_curve"]

Curve = dict[int, float]  # step -> value


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog="lopt-hf curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        dest="runs",
        action="append",
        required=True,
        metavar="LABEL=OUTPUT_DIR",
        help="A run's folder; repeat it for more runs, with the same label for the seeds of one method.",
    )
    parser.add_argument("--metric", required=True, help="What to draw, as it is called in the log, such as reward.")
    parser.add_argument("--output", type=Path, required=True, help="The file to write: .png, .svg or .pdf.")
    parser.add_argument("--smooth", type=int, default=1, help="Average over this many logged values. Default: none.")
    parser.add_argument(
        "--part", type=int, default=10, help="How many of a run's first and last values the printed means are over."
    )
    return parser


def read_curve(output_dir: str, metric: str) -> Curve:
    """What a run logged of a metric, by step.

    Args:
        output_dir: The run's folder, or one of its checkpoints.
        metric: Its name in the log.

    Raises:
        ValueError: If the folder holds no log, or the log does not hold the metric.
    """
    folders = [Path(output_dir)]
    if folders[0].is_dir() and (last := get_last_checkpoint(output_dir)) is not None:
        folders.append(Path(last))  # of a run that has not ended
    files = [path for folder in folders if (path := folder / TRAINER_STATE_NAME).is_file()]
    if not files:
        raise ValueError(f"--run {output_dir}: there is no {TRAINER_STATE_NAME}; give the output_dir of a run.")
    rows = json.loads(files[0].read_text(encoding="utf-8"))["log_history"]
    curve = {row["step"]: row[metric] for row in rows if row.get(metric) is not None}
    if not curve:
        known = ", ".join(sorted({name for row in rows for name in row} - {"step", "epoch"}))
        raise ValueError(f"--metric {metric}: the log of {output_dir} does not have it; choose from {known}.")
    return curve


def smoothed(curve: Curve, window: int) -> Curve:
    """The mean of the last `window` values at each step."""
    steps, values = list(curve), list(curve.values())
    return {step: statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i, step in enumerate(steps)}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at the steps that all curves have."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in shared}


def summary(label: str, curves: Sequence[Curve], part: int) -> str:
    """A line of a table: the means over the runs' beginnings and ends, and of each run's difference."""
    starts = [statistics.fmean(list(curve.values())[:part]) for curve in curves]
    ends = [statistics.fmean(list(curve.values())[-part:]) for curve in curves]
    rises = [end - start for start, end in zip(starts, ends, strict=True)]
    seeds = ", ".join(f"{rise:+.3f}" for rise in rises)
    start, end, rise = (statistics.fmean(values) for values in (starts, ends, rises))
    return f"| {label} | {start:.3f} | {end:.3f} | {rise:+.3f} | {seeds} |"


def draw(groups: dict[str, list[Curve]], metric: str, window: int, output: Path) -> None:
    """Writes the plot.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Curves need `matplotlib`: `pip install "lopt_hf[demo]"`.') from error
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (label, curves) in enumerate(groups.items()):
        color = f"C{number}"
        for curve in curves if len(curves) > 1 else ():
            axes.plot(*_xy(smoothed(curve, window)), color=color, alpha=0.3, linewidth=0.8)
        name = f"{label} (mean of {len(curves)})" if len(curves) > 1 else label
        axes.plot(*_xy(smoothed(mean_curve(curves), window)), color=color, linewidth=1.8, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(metric + (f", mean of {window}" if window > 1 else ""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the curves and prints the means.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    groups: dict[str, list[Curve]] = {}
    if min(options.smooth, options.part) < 1:
        parser.error(f"--smooth {options.smooth} and --part {options.part} must be at least 1.")
    try:
        for run in options.runs:
            label, separator, folder = run.partition("=")
            if not separator:
                raise ValueError(f"--run {run} must be LABEL=OUTPUT_DIR.")
            groups.setdefault(label, []).append(read_curve(folder, options.metric))
        draw(groups, options.metric, options.smooth, options.output)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lopt-hf curves: {error}")
    print(f"| {options.metric} | first {options.part} | last {options.part} | change | of each run |")
    print("| --- | ---: | ---: | ---: | --- |")
    for label, curves in groups.items():
        print(summary(label, curves, options.part))
    print(f"Curves drawn to {options.output}")


if __name__ == "__main__":
    main()
