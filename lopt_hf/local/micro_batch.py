"""A micro-batch as a boundary sees it: what it is given, how far the task's gradient reaches, what to call back."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["BoundaryEvents", "MicroBatch", "check_replay"]

MAX_REPLAY_DIFFERENCE = 0.01  # of the norms; kernels whose sums have no fixed order differ far less, even in bf16


def _run_backward(index: int, loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _nothing(index: int) -> None:
    """Nothing follows."""


def check_replay(index: int, difference: torch.Tensor) -> None:
    """Raises `RuntimeError` if a block that ran again gave something else, see `BoundaryEvents`."""
    if not difference <= MAX_REPLAY_DIFFERENCE:
        raise RuntimeError(
            f"Block {index} computes something else when it runs again (relative difference {float(difference):.3g}), "
            "so its gradients would be wrong; set reach_recompute to False, and please report the architecture."
        )


@dataclass(frozen=True)
class BoundaryEvents:
    """What a boundary calls back while a micro-batch runs.

    Attributes:
        run_backward: Runs the backward of a block's weighted loss; called with the block's index and the loss.
        on_block_done: Called with a block's index when its gradients and its head's are complete.
        around_backward: Makes a context for each backward that runs within the forward, to time it for instance.
        before_more: Makes a context for a backward after which another forward's comes to the same block.
        check_replay: Raises if a block that runs again gives something else; called once with the block's index and
            the norm of the difference relative to the output's.
    """

    run_backward: Callable[[int, torch.Tensor], None] = _run_backward
    on_block_done: Callable[[int], None] = _nothing
    check_replay: Callable[[int, torch.Tensor], None] = check_replay
    around_backward: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    before_more: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batch that a boundary works on.

    Attributes:
        events: What to call back.
        scale: Factor of the local losses that run their backward in the forward.
        trains_early_blocks: Without it early blocks have no local loss, and none has a graph that the task's gradient
            does not reach.
        inputs: The trainer's batch, for the local objective.
        reach: The number of blocks, counted from the last, that the task's gradient reaches.
        gradient_factors: By which the gradient of a block is multiplied, by the block's index; 1 where it is missing.
    """

    events: BoundaryEvents = field(default_factory=BoundaryEvents)
    scale: float = 1.0
    trains_early_blocks: bool = True
    inputs: Mapping[str, Any] = field(default_factory=dict)
    reach: int = 1
    gradient_factors: Mapping[int, float] = field(default_factory=dict)

    def factor(self, index: int) -> float:
        """The factor of a block's gradient."""
        return self.gradient_factors.get(index, 1.0)

    def factor_across(self, index: int) -> float:
        """The factor of the gradient where it passes from the block behind to this one."""
        return self.factor(index) / self.factor(index + 1)
