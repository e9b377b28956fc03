"""Simulated schedules as a table, as JSON, and as a plot of throughput over stages."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lopt_hf.common.figures import OKABE_ITO, Axes, Figure, new_figure
from lopt_hf.common.tables import markdown_table
from lopt_hf.pipeline.events import Event
from lopt_hf.pipeline.simulator.schedule import ScheduleResult

__all__ = ["make_timelines", "plot_scaling", "to_json", "to_markdown", "to_validation_markdown"]

STYLES = {
    "ppll": (OKABE_ITO["green"], "o"),
    "gpipe": (OKABE_ITO["vermilion"], "s"),
    "1f1b": (OKABE_ITO["blue"], "^"),
    "interleaved": (OKABE_ITO["purple"], "D"),
    "zero-bubble": (OKABE_ITO["orange"], "v"),
    "interleaved_zb": (OKABE_ITO["orange"], "D"),
    "zbv": (OKABE_ITO["sky blue"], "P"),
    "dualpipev": ("black", "X"),
    "ppll_delayed": (OKABE_ITO["green"], "s"),
}

JSON_FIELDS = (
    "step_seconds",
    "microbatches_per_second",
    "speedup",
    "utilisation",
    "fill_seconds",
    "bubble",
    "closed_form_bubble",
    "peak_in_flight",
)

LEGEND = """\
step: from the end of an optimizer step to the end of the next, once the pipeline is full
x one device: micro-batches per second relative to one device that trains all stages end-to-end
bubble: share of the step in which a stage computes nothing; by formula: the same if all stages are equal and messages,
  optimizer and local objective cost nothing, (K-1)/(M+K-1) for gpipe and 1f1b with K stages, M micro-batches
in flight: micro-batches whose activations the fullest stage holds; a stage of ppll holds those of one, and beside them
  the hidden states in its channels, at most their depth and one more at each end; one of ppll_delayed also the inputs
  of those whose gradients have not come, or their activations with --keeps-graph
fill: until the last stage begins its first micro-batch; end-to-end schedules fill anew in every step, ppll once"""


def to_markdown(results: Sequence[ScheduleResult], tokens_per_microbatch: int | None = None) -> str:
    """Returns the results as a Markdown table, with a legend of its columns.

    Args:
        results: One for each row.
        tokens_per_microbatch: For the throughput in tokens.
    """
    unit = "micro-batches/s" if tokens_per_microbatch is None else "tokens/s"
    header = ["schedule", "stages", "micro-batches", "step (ms)", unit, "x one device"]
    header += ["bubble, mean", "worst stage", "by formula", "in flight", "fill (ms)"]
    rows = []
    for result in results:
        workload = result.workload
        cells = [result.schedule, str(workload.times.num_stages), str(workload.microbatches)]
        cells += [_milliseconds(result.step_seconds)]
        cells += [f"{result.microbatches_per_second * (tokens_per_microbatch or 1):,.4g}", f"{result.speedup:.2f}"]
        cells += [_percent(1 - result.utilisation), _percent(max(result.bubble)), _percent(result.closed_form_bubble)]
        cells += [f"{max(result.peak_in_flight):g}", _milliseconds(result.fill_seconds)]
        rows.append(cells)
    return f"{markdown_table(header, rows, pad=True)}\n\n{LEGEND}"


def to_validation_markdown(results: Sequence[ScheduleResult], measured: Sequence[float]) -> str:
    """Returns a table of simulated and measured step times side by side.

    Args:
        results: One for each row.
        measured: Seconds of a step of each.
    """
    header = [
        "schedule",
        "stages",
        "micro-batches",
        "simulated step (ms)",
        "measured step (ms)",
        "measured - simulated",
    ]
    rows = []
    for result, seconds in zip(results, measured, strict=True):
        cells = [result.schedule, str(result.workload.times.num_stages), str(result.workload.microbatches)]
        difference = seconds / result.step_seconds - 1
        rows.append([*cells, _milliseconds(result.step_seconds), _milliseconds(seconds), f"{difference:+.1%}"])
    return markdown_table(header, rows, pad=True)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.4g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def to_json(results: Sequence[ScheduleResult], measured: Sequence[float] | None = None) -> str:
    """Returns the results with their workloads as JSON text.

    Args:
        results: What was simulated.
        measured: Seconds of a step of each, if they were run, too.
    """
    rows = [_row(result) for result in results]
    if measured is not None:
        for row, seconds in zip(rows, measured, strict=True):
            row["measured_step_seconds"] = seconds
    return json.dumps(rows, indent=2, allow_nan=False)


def _row(result: ScheduleResult) -> dict[str, Any]:
    workload = asdict(result.workload)
    workload["bandwidth"] = None if workload["bandwidth"] == float("inf") else workload["bandwidth"]
    return {"schedule": result.schedule, **{name: getattr(result, name) for name in JSON_FIELDS}, "workload": workload}


def make_timelines(results: Sequence[ScheduleResult], steps: int) -> dict[str, list[Event]]:
    """Returns what the stages compute in the first steps, by a title that tells the results apart.

    Args:
        results: What was simulated.
        steps: How many optimizer steps, see `ScheduleResult.events`.
    """
    several = len({(r.workload.times.num_stages, r.workload.microbatches) for r in results}) > 1
    timelines = {}
    for result in results:
        size = f", {result.workload.times.num_stages} stages, {result.workload.microbatches} micro-batches" * several
        timelines[result.schedule + size] = list(result.events(steps))
    return timelines


def plot_scaling(results: Sequence[ScheduleResult]) -> Figure:
    """Plots throughput over the number of stages: a panel for each number of micro-batches, a line for each schedule.

    Args:
        results: What to draw.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If all results have the same number of stages.
    """
    stages = sorted({result.workload.times.num_stages for result in results})
    if len(stages) < 2:
        raise ValueError(f"stages={stages[0]}: a plot of scaling needs several numbers, such as --stages 2,4,8,16.")
    counts = sorted({result.workload.microbatches for result in results})
    figure = new_figure(1.2 + 3.9 * len(counts), 4.6)
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        _draw_scaling(axes, [result for result in results if result.workload.microbatches == count], stages)
        axes.set_title(f"{count} micro-batches per step", fontsize="medium")
        axes.set_xlabel("stages (devices)")
    panels[0].set_ylabel("simulated throughput, relative to one device")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _draw_scaling(axes: Axes, results: Sequence[ScheduleResult], stages: Sequence[int]) -> None:
    axes.plot(stages, stages, color="0.6", linestyle=":", label="one device times stages")
    for schedule, (color, marker) in STYLES.items():
        points = sorted((r.workload.times.num_stages, r.speedup) for r in results if r.schedule == schedule)
        if points:
            size = 8 if schedule == "gpipe" else 5  # often equal to 1f1b, which is drawn over it
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=size, label=schedule)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xticks(stages)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
