"""What a pipeline schedule is simulated for: the stages' times, the micro-batches of a step, and the hardware."""

import math
from dataclasses import dataclass

__all__ = ["StageTimes", "Workload"]


@dataclass(frozen=True)
class StageTimes:
    """Times of one micro-batch on each stage, in seconds; every field has one value for each stage.

    Attributes:
        forward: Forward, on the last stage with the task loss.
        backward: Backward with respect to inputs and weights.
        local: Local objective of a stage that has one, forward and backward; only PPLL computes it.
        optimizer: Optimizer step, once for all micro-batches of a step.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    local: tuple[float, ...]
    optimizer: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "local", "optimizer"):
            values = getattr(self, name)
            if len(values) != len(self.forward):
                raise ValueError(
                    f"{name}={list(values)} has {len(values)} values but forward has {len(self.forward)}; "
                    "give one for each stage."
                )
            if not all(0 <= value < math.inf for value in values):
                raise ValueError(f"{name}={list(values)}: times are finite and not negative.")
        if not self.forward or not all(f + b > 0 for f, b in zip(self.forward, self.backward, strict=True)):
            raise ValueError(
                f"forward={list(self.forward)} and backward={list(self.backward)}: every stage needs some time for a "
                "micro-batch."
            )

    @classmethod
    def equal(
        cls, stages: int, forward: float, backward: float, local: float = 0.0, optimizer: float = 0.0
    ) -> "StageTimes":
        """Makes equal times for all stages; the last one has no local objective."""
        last = (local,) * (stages - 1) + (0.0,)
        return cls((forward,) * stages, (backward,) * stages, last, (optimizer,) * stages)

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.forward)


@dataclass(frozen=True)
class Workload:
    """A training step and the hardware that it runs on.

    Attributes:
        times: Times of each stage. Where a rank holds several virtual stages, each has its even share.
        microbatches: Micro-batches of an optimizer step.
        message_bytes: Size of a micro-batch's hidden states, and of their gradients.
        bandwidth: Of each rank's link to the next one, and of its link back, in bytes per second.
        latency: Of each message, in seconds.
        channel_depth: Hidden states that wait at each end of a PPLL channel, beside the one that is under way.
        virtual_stages: Stages on each rank in `interleaved` and `interleaved_zb`.
        cores: Cores that all stages share; default: a device for each stage.
        weight_share: Part of the backward that computes gradients of weights, which zero-bubble schedules put off.
        keeps_graph: Whether `ppll_delayed` keeps the graphs of micro-batches whose gradients have not come, instead of
            running their forward again.
    """

    times: StageTimes
    microbatches: int
    message_bytes: float = 0.0
    bandwidth: float = math.inf
    latency: float = 0.0
    channel_depth: int = 2  # ours, as in `PipelineConfig`
    virtual_stages: int = 2  # ours: the smallest that interleaves
    cores: float | None = None
    weight_share: float = 0.5  # matrix products of inputs and of weights cost the same (arXiv 2401.10241, Sec. 2)
    keeps_graph: bool = False  # ours

    def __post_init__(self) -> None:
        for name in ("microbatches", "channel_depth", "virtual_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
        for name in ("message_bytes", "latency"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and not negative.")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth={self.bandwidth}: must be more than 0.")
        if self.cores is not None and not self.cores > 0:
            raise ValueError(f"cores={self.cores}: must be more than 0.")
        if not 0 <= self.weight_share <= 1:
            raise ValueError(f"weight_share={self.weight_share}: must be between 0 and 1.")
