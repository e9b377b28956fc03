"""What the processes of a method do in a round of `lopt-hf bench pipeline`, and what each measured."""

from dataclasses import dataclass, field
from time import perf_counter, process_time

from lopt_hf.bench.pipeline.parts import Cut
from lopt_hf.bench.pipeline.settings import PPLL, BenchSettings
from lopt_hf.bench.processes import peak_resident_bytes
from lopt_hf.pipeline.runtime.config import PipelineConfig
from lopt_hf.pipeline.runtime.timeline import WAITS, Timeline

__all__ = ["MethodRun", "Record"]


@dataclass(frozen=True)
class MethodRun:
    """What the processes of a method do in one round.

    Attributes:
        method: One of `METHODS`.
        settings: What is measured.
        checkpoint: The model's folder or hub id.
        cut: Where its stages and their parts begin. End-to-end methods clip each part apart.
        folder: Where a trainer may write.
        port: Of the store on this host through which the processes find each other.
    """

    method: str
    settings: BenchSettings
    checkpoint: str
    cut: Cut
    folder: str
    port: int

    @property
    def split_at(self) -> list[int]:
        """First layer of every stage but the first."""
        return self.cut.rerun_at if self.method == "ppll_delayed" else self.cut.split_at

    @property
    def parts_at(self) -> list[int]:
        """First layer of every part but the first."""
        return self.cut.parts_at

    @property
    def total_steps(self) -> int:
        """Of PPLL some more: while its last steps end, earlier stages are done and no longer share the machine."""
        settings = self.settings
        steps = settings.warmup + settings.steps
        if self.method not in PPLL:
            return steps
        ahead = (settings.stages - 1) * (2 * PipelineConfig.channel_depth + 2)  # micro-batches of the first stage
        return steps + -(-ahead // settings.microbatches)


@dataclass
class Record:
    """What one process measured.

    Attributes:
        ends: When each step ended, by `time.perf_counter`: one clock for all processes of a machine.
        losses: Task loss of each step in nats per token or image, where the process has it.
        saved_bytes: Peak bytes that autograd kept for backward, in the last step of the warm-up; where graphs are kept
            from step to step, they and their weights at the end of a step.
        queued_bytes: Most bytes that wait in the stage's channel to the next one.
        waiting: Share of the timed steps in which the stage waited for another; 0 in one process.
        cpu_seconds: CPU time of the process per timed step, all its threads.
        core_share: CPU time per second that it did not wait: below 1 by what other programs took.
        peak_resident_bytes: Peak resident memory of the process.
    """

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    queued_bytes: int = 0
    waiting: float = 0.0
    cpu_seconds: float = 0.0
    core_share: float = 0.0
    peak_resident_bytes: int = 0
    cpu_ends: list[float] = field(default_factory=list)

    def end_step(self) -> None:
        """Notes that a step ends now."""
        self.ends.append(perf_counter())
        self.cpu_ends.append(process_time())

    def finish(self, run: MethodRun, timeline: Timeline | None) -> "Record":
        """Sums up the timed steps."""
        before = run.settings.warmup - 1
        last = before + run.settings.steps
        seconds = self.ends[last] - self.ends[before]
        cpu_seconds = self.cpu_ends[last] - self.cpu_ends[before]
        events = [] if timeline is None else [event for event in timeline.events if before < event.step <= last]
        waited = sum(event.end - event.start for event in events if event.kind in WAITS)
        self.waiting = waited / seconds
        self.cpu_seconds = cpu_seconds / run.settings.steps
        self.core_share = cpu_seconds / (seconds - waited)
        self.peak_resident_bytes = peak_resident_bytes()
        return self
