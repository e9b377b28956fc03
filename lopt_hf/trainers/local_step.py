"""An early block's step as soon as its gradient is there, and the gradient freed before the next block runs."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from lopt_hf.trainers.block_optimizer import BlockOptimizerMixin
from lopt_hf.trainers.block_parameters import ClipGroup

__all__ = ["Completion", "LocalStepMixin", "stepping_only"]

logger = logging.get_logger(__name__)


class LocalStepMixin(BlockOptimizerMixin):
    """Steps an early block right after its local backward (`local_step=True`; paper, App. L).

    There is one torch optimizer as ever: a step of some parameters is a call of it that sees their gradients only. So
    `trainer.optimizer`, schedulers and checkpoints are what they are without, and clipping apart leaves nothing by
    which one step could change another's.

    With `clip_scope="part"` it also steps in the middle of a backward: the LM head before the gradients of its
    block's layers are made, an early block's layers before those of the embeddings.
    """

    _stepped_norms: dict[str, torch.Tensor]  # of the groups that have taken the step under way, by name

    def _warn_of_accumulation(self) -> None:
        if self.args.local_step and self.args.gradient_accumulation_steps > 1:
            logger.warning(
                f"local_step=True saves no memory with gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps}: the gradients of all blocks are kept until the last of its "
                "micro-batches. Raise per_device_train_batch_size instead, if it fits."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._stepping_in_backward():
            return super().training_step(*args, **kwargs)

    @contextlib.contextmanager
    def _stepping_in_backward(self) -> Iterator[None]:
        """Lets a group step as soon as its gradients are complete, if others of its block's are still to be made."""
        # Under DDP a gradient is complete when it is averaged, which is after the backward.
        if not (self.args.local_step and self.accelerator.sync_gradients) or self._reduces_early_gradients():
            yield
            return
        groups = self._clip_groups()
        completions = [
            Completion(group.parameters, partial(self._step_group, group))
            for group, next_group in pairwise(groups)
            if group.block == next_group.block
        ]
        try:
            yield
        finally:
            for completion in completions:
                completion.remove()

    def _check_first_backward(self, index: int) -> None:
        if any(group.block == index and group.name in self._stepped_norms for group in self._clip_groups()):
            raise RuntimeError(
                f"local_step=True: block {index} runs forward with gradients a second time after its step. This "
                "trainer's loss takes several forwards for each micro-batch; set local_step to False."
            )

    def _step_early_block(self, index: int) -> None:
        """Averages, clips and applies what has not stepped yet of an early block's gradients, and frees them."""
        self._reducer.wait()
        for group in self._clip_groups():
            if group.block == index and group.name not in self._stepped_norms:
                self._step_group(group)

    def _step_group(self, group: ClipGroup) -> None:
        max_norm = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        norm = self._clip_group(group, max_norm)
        self._check_finite(f"grad_norm of {group.name}", norm.item())
        with stepping_only(self.optimizer, group.parameters):
            self.optimizer.step()
        for parameter in group.parameters:
            parameter.grad = None
        self._stepped_norms[group.name] = norm

    def _clip_group(self, group: ClipGroup, max_norm: float) -> torch.Tensor:
        if group.name in self._stepped_norms:
            return self._stepped_norms.pop(group.name)
        return super()._clip_group(group, max_norm)


class Completion:
    """Calls a function once, when a backward has added to the gradient of each of some parameters.

    Args:
        parameters: The parameters; frozen ones are passed over.
        call: What to call, in the backward. Not called if a parameter has no part in the loss.
    """

    def __init__(self, parameters: Collection[nn.Parameter], call: Callable[[], None]) -> None:
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        self._missing = {id(parameter) for parameter in learning}
        self._call = call
        self._handles = [parameter.register_post_accumulate_grad_hook(self._arrive) for parameter in learning]

    def _arrive(self, parameter: torch.Tensor) -> None:
        if not self._missing:
            return
        self._missing.discard(id(parameter))
        if not self._missing:
            self._call()

    def remove(self) -> None:
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
