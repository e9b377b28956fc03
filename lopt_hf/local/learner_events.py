"""What a learner asks of whoever runs its steps."""

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lopt_hf.local.methods.base import Batches
from lopt_hf.local.micro_batch import check_replay

__all__ = ["LearnerEvents"]

logger = logging.getLogger(__name__)


def _run_backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _check_finite(name: str, value: torch.Tensor | float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{name} is {value}; lower the learning rate.")


@dataclass(frozen=True)
class LearnerEvents:
    """What a learner asks of whoever runs its steps; the defaults are those of a bare loop in one process.

    Attributes:
        run_backward: Runs the backward of a loss, scaled as the optimizer expects gradients.
        around_backward: Makes a context for each backward that runs within the forward, to time it for instance.
        around_step: Makes a context for the clipping and the step of a part of the model.
        check_finite: Raises if a figure, given with its name, is not finite.
        check_replay: Raises if a block that runs again gives something else, see `BoundaryEvents`.
        optimizer: Returns the optimizer that `step_block` steps.
        autocast: Makes the context in which the model computes.
        calibration_batches: Gives batches of training data before training; without it nothing is calibrated.
        say: Tells the user a line.
    """

    run_backward: Callable[[torch.Tensor], None] = _run_backward
    around_backward: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    around_step: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    check_finite: Callable[[str, torch.Tensor | float], None] = _check_finite
    check_replay: Callable[[int, torch.Tensor], None] = check_replay
    optimizer: Callable[[], Any] | None = None
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    calibration_batches: Batches | None = None
    say: Callable[[str], None] = logger.warning
