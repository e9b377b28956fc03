"""Timeline of a stage: recorded while it runs, and summarised in the logs."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from lopt_hf.pipeline.events import Event

__all__ = ["Timeline"]

WAITS = ("receive", "send")  # the other kinds of event are work


class Timeline:
    """Records what one stage does.

    A span inside another (a local backward inside a forward) takes its time from the outer one. Waiting before the
    first work is the fill of the pipeline and counts as no bubble.

    Attributes:
        events: What was kept; times in seconds since the epoch.
        step: The optimizer step that is under way, from 0.
        micro_batch: The micro-batch that is under way, counted from 0 from the start of the run; -1 before it.

    Args:
        stage: The stage.
        kept_steps: Events of this many first steps are kept; sums are made of all.
    """

    def __init__(self, stage: int, kept_steps: int = 0) -> None:
        self.events: list[Event] = []
        self.step = 0
        self.micro_batch = -1
        self._stage = stage
        self._kept_steps = kept_steps
        self._clock = time.time() - time.perf_counter()
        self._filled_at: float | None = None
        self._waited = 0.0
        self._depths: list[int] = []
        self._open: list[list[Any]] = []

    @contextlib.contextmanager
    def span(self, kind: str, step: int | None = None, micro_batch: int | None = None) -> Iterator[None]:
        """Records what happens inside as one event, or several where another lies inside it.

        Args:
            kind: See `Event`.
            step: As in `add`.
            micro_batch: As in `add`.
        """
        start = time.perf_counter()
        if self._open:
            self._close(start)  # the outer span pauses
        self._open.append([kind, start, step, micro_batch])
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

    def add(
        self, kind: str, start: float, end: float, step: int | None = None, micro_batch: int | None = None
    ) -> None:
        """Records a span.

        Args:
            kind: See `Event`.
            start: Where it begins, by `time.perf_counter()`.
            end: Where it ends, likewise.
            step: The optimizer step that it belongs to. Default: the one that is under way.
            micro_batch: Its micro-batch. Default: likewise.
        """
        if kind in WAITS and self._filled_at is not None:
            self._waited += end - start
        if kind not in WAITS and self._filled_at is None:
            self._filled_at = start
        step = self.step if step is None else step
        micro_batch = self.micro_batch if micro_batch is None else micro_batch
        if step < self._kept_steps and end > start:
            number = step if kind == "optimizer" else micro_batch
            self.events.append(Event(self._stage, kind, number, start + self._clock, end + self._clock, step=step))

    def _close(self, end: float) -> None:
        kind, start, step, micro_batch = self._open[-1]
        self.add(kind, start, end, step, micro_batch)
