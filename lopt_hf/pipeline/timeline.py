"""What each stage did when: recorded from real events, summarised in the logs, drawn as a picture."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Span", "Timeline", "draw_timeline", "write_chrome_trace"]

# What a stage waits for; everything else is work.
WAITS = ("receive", "send")
COLORS = {"forward": "#4c78a8", "backward": "#f58518", "step": "#54a24b", "receive": "#d9d9d9", "send": "#b0b0b0"}


@dataclass(frozen=True)
class Span:
    """One thing that a stage did.

    Attributes:
        kind: `forward`, `backward`, `step`, or a wait: `receive`, `send`.
        start: Seconds since the epoch.
        end: Seconds since the epoch.
        step: Optimizer step, from 0.
        micro_batch: Micro-batch of that step, from 0; -1 for the optimizer's step.
    """

    kind: str
    start: float
    end: float
    step: int
    micro_batch: int


class Timeline:
    """Records the spans of one stage.

    A span inside another (a local backward inside a forward) takes its time from the outer one. Waiting before the
    first message is the fill of the pipeline and counts as no bubble.

    Args:
        kept_steps: Spans of this many first steps are kept for drawing; sums are made of all.
    """

    def __init__(self, kept_steps: int = 0) -> None:
        self.spans: list[Span] = []
        self.step = 0
        self.micro_batch = 0
        self._kept_steps = kept_steps
        self._clock = time.time() - time.perf_counter()
        self._filled_at: float | None = None
        self._waited = 0.0
        self._depths: list[int] = []
        self._open: list[list[Any]] = []

    @contextlib.contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Records what happens inside as one span."""
        start = time.perf_counter()
        if self._open:
            self._close(start)  # the outer span pauses
        self._open.append([kind, start])
        try:
            yield
        finally:
            self._close(end := time.perf_counter())
            self._open.pop()
            if self._open:
                self._open[-1][1] = end

    def note_depth(self, depth: int) -> None:
        """Records how many messages wait for this stage."""
        self._depths.append(depth)

    def summary(self) -> dict[str, float]:
        """The figures since the last call.

        Returns:
            `utilisation`, the share of time that is not spent waiting; `bubble_share`, the share that is, without the
            fill; `queue_depth`, the mean number of messages that waited for this stage.
        """
        now = time.perf_counter()
        elapsed = now - self._filled_at if self._filled_at is not None else 0.0
        bubble = min(self._waited / elapsed, 1.0) if elapsed > 0 else 0.0
        depth = sum(self._depths) / len(self._depths) if self._depths else 0.0
        self._filled_at, self._waited, self._depths = now, 0.0, []
        return {"utilisation": 1.0 - bubble, "bubble_share": bubble, "queue_depth": depth}

    def add(self, kind: str, start: float, end: float) -> None:
        """Records a span, given by `time.perf_counter()`."""
        if kind in WAITS and self._filled_at is not None:
            self._waited += end - start
        if kind not in WAITS and self._filled_at is None:
            self._filled_at = start
        if self.step < self._kept_steps and end > start:
            micro_batch = -1 if kind == "step" else self.micro_batch
            self.spans.append(Span(kind, start + self._clock, end + self._clock, self.step, micro_batch))

    def _close(self, end: float) -> None:
        kind, start = self._open[-1]
        self.add(kind, start, end)


def write_chrome_trace(path: Path, timelines: Sequence[tuple[str, Sequence[Span]]]) -> None:
    """Writes spans for `chrome://tracing` and Perfetto (Trace Event Format, complete events, microseconds).

    Args:
        path: The JSON file.
        timelines: For each process its name and its spans.
    """
    origin = min((span.start for _, spans in timelines for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for row, (name, spans) in enumerate(timelines):
        events.append({"ph": "M", "name": "process_name", "pid": row, "args": {"name": name}})
        events += [
            {
                "ph": "X",
                "name": span.kind,
                "cat": "wait" if span.kind in WAITS else "work",
                "pid": row,
                "tid": 0,
                "ts": (span.start - origin) * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"step": span.step + 1, "micro_batch": span.micro_batch + 1},
            }
            for span in spans
        ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def draw_timeline(path: Path, timelines: Sequence[tuple[str, Sequence[Span]]]) -> None:
    """Draws spans as one bar per process.

    Args:
        path: The PNG file.
        timelines: For each process its name and its spans.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    origin = min((span.start for _, spans in timelines for span in spans), default=0.0)
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.55 * len(timelines)), layout="constrained")
    for row, (_, spans) in enumerate(timelines):
        for kind, color in COLORS.items():
            bars = [(span.start - origin, span.end - span.start) for span in spans if span.kind == kind]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(timelines)), [name for name, _ in timelines])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    labels = {"receive": "waits for input", "send": "waits for the next stage", "step": "optimizer step"}
    handles = [Patch(color=color, label=labels.get(kind, kind)) for kind, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(COLORS), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
