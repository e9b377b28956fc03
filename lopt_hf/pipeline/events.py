"""Timelines of a pipeline's stages, real or simulated, as Chrome-trace JSON and as a plot.

The JSON is the Trace Event Format that https://ui.perfetto.dev opens.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lopt_hf.common.figures import OKABE_ITO, Axes, Figure, new_figure

__all__ = ["Event", "chrome_trace", "plot_timeline"]

COLORS = {
    "forward": OKABE_ITO["sky blue"],
    "backward": OKABE_ITO["vermilion"],
    "weight": OKABE_ITO["orange"],
    "local": OKABE_ITO["green"],
    "optimizer": "#333333",
    "receive": "#DDDDDD",
    "send": "#BBBBBB",
}
MICROSECONDS = 1e6
WIDTH = 12.0  # inches
DIGIT_WIDTH = 0.0055  # of a micro-batch's number, relative to the width of the plot


@dataclass(frozen=True)
class Event:
    """A span of time in which a stage computes or, in a real run, waits.

    Attributes:
        stage: The stage; where a rank holds several, the rank.
        kind: `forward`, `backward`, `weight` (the weights' part of the backward in zero bubble), `local` or
            `optimizer`; waiting is `receive` or `send`.
        microbatch: Its micro-batch; of an optimizer step, the step's number.
        start, end: In seconds from the start of the run.
        chunk: Which of the rank's stages, where it holds several.
        step: The optimizer step that it belongs to, where that is known, from 0.
    """

    stage: int
    kind: str
    microbatch: int
    start: float
    end: float
    chunk: int = 0
    step: int = 0


def chrome_trace(pipelines: Mapping[str, Sequence[Event]]) -> str:
    """Returns events as JSON text in the Trace Event Format.

    Args:
        pipelines: Events of each pipeline by its name, such as the schedule's; a pipeline becomes a process of the
            trace, a stage a thread.
    """
    rows: list[dict[str, object]] = []
    for process, (name, events) in enumerate(pipelines.items()):
        rows.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        for stage in sorted({event.stage for event in events}):
            thread = {"pid": process, "tid": stage}
            rows.append({"ph": "M", "name": "thread_name", **thread, "args": {"name": f"stage {stage}"}})
        rows += [_complete_event(event, process) for event in events]
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})


def _complete_event(event: Event, process: int) -> dict[str, object]:
    return {
        "ph": "X",
        "name": f"{event.kind} {event.microbatch}",
        "cat": event.kind,
        "pid": process,
        "tid": event.stage,
        "ts": event.start * MICROSECONDS,
        "dur": (event.end - event.start) * MICROSECONDS,
        "args": {"microbatch": event.microbatch, "chunk": event.chunk},
    }


def plot_timeline(pipelines: Mapping[str, Sequence[Event]]) -> Figure:
    """Plots a panel for each pipeline with a row for each stage; the panels share their time axis.

    Args:
        pipelines: Events by the title of their panel.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If a pipeline has no events.
    """
    for title, events in pipelines.items():
        if not events:
            raise ValueError(f"{title}: there are no events to draw.")
    stages = [1 + max(event.stage for event in events) for events in pipelines.values()]
    figure = new_figure(WIDTH, 0.8 + sum(0.6 + min(0.3 * count, 5.0) for count in stages))
    panels = figure.subplots(len(pipelines), 1, sharex=True, squeeze=False, height_ratios=stages)[:, 0]
    end = max(event.end for events in pipelines.values() for event in events)
    unit, factor = ("ms", 1e3) if end < 10 else ("s", 1.0)
    for axes, (title, events), count in zip(panels, pipelines.items(), stages, strict=True):
        _draw_stages(axes, events, factor, end)
        axes.set(title=title, ylim=(count - 0.4, -0.6), xlim=(0, end * factor))
        axes.set_yticks(range(0, count, max(1, count // 8)))
        axes.set_ylabel("stage")
    panels[-1].set_xlabel(f"time ({unit})")
    _add_legend(figure, {event.kind for events in pipelines.values() for event in events})
    return figure


def _draw_stages(axes: Axes, events: Iterable[Event], factor: float, total: float) -> None:
    by_row: dict[tuple[int, str], list[Event]] = {}
    for event in events:
        by_row.setdefault((event.stage, event.kind), []).append(event)
    for (stage, kind), row in by_row.items():
        spans = [(event.start * factor, (event.end - event.start) * factor) for event in row]
        edge: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.4} if len(row) <= 64 else {}
        axes.broken_barh(spans, (stage - 0.42, 0.84), facecolor=COLORS[kind], **edge)
        for event in row:
            _write_number(axes, event, factor, total)
    axes.spines[["top", "right"]].set_visible(False)


def _write_number(axes: Axes, event: Event, factor: float, total: float) -> None:
    text = str(event.microbatch)
    if event.kind != "optimizer" and event.end - event.start >= DIGIT_WIDTH * (len(text) + 0.5) * total:
        middle = (event.start + event.end) / 2 * factor
        axes.text(middle, event.stage, text, ha="center", va="center", fontsize=7, clip_on=True)


def _add_legend(figure: Figure, kinds: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=kind) for kind, color in COLORS.items() if kind in kinds]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
