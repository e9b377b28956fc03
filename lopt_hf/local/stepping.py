"""Stepping an optimizer part by part: which gradients are clipped together, and steps that see some gradients only."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = [
    "ClipGroup",
    "GradientsComplete",
    "delay_schedules",
    "end_schedules_at",
    "set_learning_rate",
    "stepping_only",
]


@dataclass(frozen=True)
class ClipGroup:
    """Parameters whose gradients are clipped together.

    Attributes:
        name: What they are, for messages; each group of a model has another.
        block: Index of the block that owns them.
        parameters: The parameters, frozen ones included.
    """

    name: str
    block: int
    parameters: list[nn.Parameter]

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clips the group's gradients; returns their norm before."""
        norm = clip_grad_norm_(self.parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


class GradientsComplete:
    """Calls a function once, when a backward has added to the gradient of each of some parameters.

    Args:
        parameters: The parameters; frozen ones are passed over.
        call: What to call, in the backward. Not called if a parameter has no part in the loss.
        counts: Whether the backward under way counts.
    """

    def __init__(
        self, parameters: Collection[nn.Parameter], call: Callable[[], None], counts: Callable[[], bool]
    ) -> None:
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        self._missing = {id(parameter) for parameter in learning}
        self._call, self._counts = call, counts
        self._handles = [parameter.register_post_accumulate_grad_hook(self._arrive) for parameter in learning]

    def _arrive(self, parameter: torch.Tensor) -> None:
        if not self._missing or not self._counts():
            return
        self._missing.discard(id(parameter))
        if not self._missing:
            self._call()

    def remove(self) -> None:
        """Stops waiting."""
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def stepping_only(optimizer: torch.optim.Optimizer, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Lets an optimizer, stepped in this block, see the gradients of some of its parameters only.

    Those of the others are hidden and not left out, since some optimizers know a parameter by its place in its group.
    The groups are copies: what an optimizer counts there (schedule-free's steps) is to be counted once, by the step
    of the last block.

    Args:
        optimizer: Any optimizer that passes over parameters without a gradient.
        parameters: Those that may move.
    """
    members = {id(parameter) for parameter in parameters}
    groups: list[dict[str, Any]] = optimizer.param_groups
    others = [p for group in groups for p in group["params"] if id(p) not in members and p.grad is not None]
    hidden = [parameter.grad for parameter in others]
    for parameter in others:
        parameter.grad = None
    optimizer.param_groups = [dict(group) for group in groups]
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for parameter, gradient in zip(others, hidden, strict=True):
            parameter.grad = gradient


def set_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: Collection[nn.Parameter], learning_rate: float
) -> None:
    """Moves parameters of an optimizer to groups of their own that have another learning rate."""
    members = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in members]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in members]
            optimizer.add_param_group({**group, "params": chosen, "lr": learning_rate})


def end_schedules_at(
    scheduler: LRScheduler, ends: Iterable[tuple[Collection[nn.Parameter], int]], total_steps: int
) -> None:
    """Lets the learning rates of some parameters run through the whole of a schedule in fewer steps.

    Args:
        scheduler: Of one of transformers' schedules, over groups each of which holds parameters of one set alone.
        ends: Sets of parameters, each with the number of steps of its schedule; 0 leaves the schedule as it is.
        total_steps: Those of the scheduler's.

    Raises:
        ValueError: If the scheduler follows the loss, and no function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"reach_anneal=True needs a schedule that is a function of the step, and {type(scheduler).__name__} "
            "follows the loss; set lr_scheduler_type to one such as cosine or linear."
        )
    end_of = {id(parameter): end for parameters, end in ends for parameter in parameters}
    for index, group in enumerate(scheduler.optimizer.param_groups):
        end = end_of.get(id(group["params"][0])) if group["params"] else None
        if end:
            scheduler.lr_lambdas[index] = partial(_sooner, scheduler.lr_lambdas[index], total_steps / end, total_steps)


def delay_schedules(
    scheduler: LRScheduler, delay: int, num_warmup_steps: int = 0, makes_up_in: int | None = None
) -> None:
    """Lets all learning rates begin their schedules later, and stay until then at the first value.

    Args:
        scheduler: Of one of transformers' schedules.
        delay: Steps by which they begin later.
        num_warmup_steps: Steps from there in which they rise from 1 / (1 + delay) of the schedule to the whole of it,
            geometrically (PipeMare, arXiv 1910.05124, its T1).
        makes_up_in: Steps of the run, in all of which the rates are higher by the root of the factor by which the rise
            lowers their sum (ours: halfway between what high rates and what low ones would have).

    Raises:
        ValueError: If the scheduler follows the loss, and no function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"{type(scheduler).__name__} cannot be delayed, since it is no function of the step; set "
            "lr_scheduler_type to one that is, such as cosine or linear."
        )
    share = partial(_risen, delay, num_warmup_steps)
    for index, factor in enumerate(scheduler.lr_lambdas):
        scale = 1.0
        if makes_up_in is not None:
            whole = sum(factor(step) for step in range(makes_up_in))
            lowered = sum(factor(step) * share(step) for step in range(makes_up_in))
            scale = math.sqrt(whole / lowered) if lowered else 1.0
        scheduler.lr_lambdas[index] = partial(_later, factor, delay, share, scale)


def _risen(delay: int, num_warmup_steps: int, step: int) -> float:
    left = max(1 - step / num_warmup_steps, 0.0) if num_warmup_steps else 0.0
    return float((1 + delay) ** -left)


def _later(
    factor: Callable[[Any], float], delay: int, share: Callable[[int], float], scale: float, step: int
) -> float:
    own = max(step - delay, 0)
    return factor(own) * share(own) * scale


def _sooner(factor: Callable[[Any], float], speed: float, total_steps: int, step: int) -> float:
    return factor(min(step * speed, total_steps))
