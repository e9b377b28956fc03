"""An early block's step as soon as its gradient is there, and the gradient freed before the next block runs."""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from lopt_hf.trainers.block_optimizer import BlockOptimizerMixin

__all__ = ["LocalStepMixin", "stepping_only"]

logger = logging.get_logger(__name__)


class LocalStepMixin(BlockOptimizerMixin):
    """Steps an early block right after its local backward (`local_step=True`; paper, App. L).

    There is one torch optimizer as ever: a block's step is a call of it that sees that block's gradients only. So
    `trainer.optimizer`, schedulers and checkpoints are what they are without, and per-block clipping leaves nothing
    by which one block's step could change another's.
    """

    _early_norms: dict[int, torch.Tensor]  # of the blocks that have taken the step under way

    def _warn_of_accumulation(self) -> None:
        if self.args.local_step and self.args.gradient_accumulation_steps > 1:
            logger.warning(
                f"local_step=True saves no memory with gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps}: the gradients of all blocks are kept until the last of its "
                "micro-batches. Raise per_device_train_batch_size instead, if it fits."
            )

    def _step_early_block(self, index: int) -> None:
        """Averages, clips and applies the gradients of an early block, and frees them."""
        if index in self._early_norms:
            raise RuntimeError(
                f"local_step=True: block {index} runs forward with gradients a second time after its step. This "
                "trainer's loss takes several forwards for each micro-batch; set local_step to False."
            )
        parameters = self._clip_groups()[index]
        self._reducer.wait()
        max_norm = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        norm = self._clip_block(index, parameters, max_norm)
        self._check_finite(f"grad_norm of block {index}", norm.item())
        with stepping_only(self.optimizer, parameters):
            self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        self._early_norms[index] = norm

    def _clip_block(self, index: int, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        if index in self._early_norms:
            return self._early_norms.pop(index)
        return super()._clip_block(index, parameters, max_norm)


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
