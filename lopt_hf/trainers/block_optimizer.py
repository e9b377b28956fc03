"""From gradients to the optimizer's step: averaging over processes, clipping per block, learning rates."""

import contextlib
import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from transformers import TrainerCallback

from lopt_hf.common.distributed import GradientReducer, broadcast_parameters
from lopt_hf.common.upstream.torch import ignored_by_ddp
from lopt_hf.local.boundary import GradientBoundary
from lopt_hf.trainers.block_parameters import BlockParametersMixin, ClipGroup

__all__ = ["BlockOptimizerMixin", "ZeroHeadGradients"]


class BlockOptimizerMixin(BlockParametersMixin):
    """Puts the heads into the optimizer, clips per block, and averages the early blocks' gradients under DDP."""

    boundary: GradientBoundary
    optimizer: Any
    _reducer: GradientReducer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        target = self.model if model is None else model
        with contextlib.nullcontext() if self._heads_in_model else _registered(target, self.local_heads):
            is_new = self.optimizer is None
            optimizer = super().create_optimizer(model)
        present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        learning = (parameter for parameter in self.local_heads.parameters() if parameter.requires_grad)
        missing = [parameter for parameter in learning if id(parameter) not in present]
        if missing:  # an optimizer of the user's own
            optimizer.param_groups[0]["params"].extend(missing)  # not a new group: a scheduler may know the groups
        if is_new and self.args.early_learning_rate is not None:
            early = {id(parameter) for block in self._learners()[:-1] for parameter in block}
            _set_learning_rate(optimizer, early, self.args.early_learning_rate)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        return self._clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        norm = self._clip(math.inf) if grad_norm is None else grad_norm
        # A gradient scaler skips the step by itself.
        if norm is not None and self.accelerator.scaler is None:
            self._check_finite("grad_norm", float(norm))
        return norm

    def _clip(self, max_norm: float) -> Any:
        """Clips the gradients as `clip_scope` says; returns the norm of all of them before."""
        if self._reduces_early_gradients() and self.boundary.mode == "joint":
            self._reducer.start([parameter for block in self._learners()[:-1] for parameter in block])
        self._reducer.wait()
        if self.args.clip_scope == "global":
            heads = [] if self._heads_in_model else self.local_heads.parameters()
            return self.accelerator.clip_grad_norm_([*self.model.parameters(), *heads], max_norm)
        self.accelerator.unscale_gradients()
        norms = [self._clip_group(group, max_norm) for group in self._clip_groups()]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _clip_group(self, group: ClipGroup, max_norm: float) -> torch.Tensor:
        """Clips a group; returns its norm before."""
        norm = clip_grad_norm_(group.parameters, max_norm)
        full_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return full_norm.to(self.args.device)

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            weights = "weights that have not stepped yet" if self.args.local_step else "weights"
            raise FloatingPointError(
                f"{name} is {value} at step {self.state.global_step + 1}. Training stops before this step changes the "
                f"{weights}; the checkpoints in output_dir={self.args.output_dir!r} are from before. Lower "
                "learning_rate or early_learning_rate, or raise warmup_steps, and resume."
            )

    def _reduces_early_gradients(self) -> bool:
        return self.accelerator.num_processes > 1 and not self._heads_in_model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        # The early blocks' gradients are ready inside the forward, or do not follow from the forward's output; DDP's
        # reducer would wait for them, or see them twice. `GradientReducer` averages them instead.
        with ignored_by_ddp(self.model, [name for block in self._owned()[:-1] for name in block]):
            prepared = super()._prepare_for_training(*args, **kwargs)
        if self._reduces_early_gradients():
            self._synchronise_start()
        return prepared

    def _synchronise_start(self) -> None:
        """Gives all ranks the same start of what DDP does not broadcast."""
        broadcast_parameters([*self._early_parameters(), *self.local_heads.parameters()])


class ZeroHeadGradients(TrainerCallback):
    """Does for the heads what the training loop's `model.zero_grad()` does for the model's parameters."""

    def __init__(self, heads: nn.ModuleDict) -> None:
        self.heads = heads

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.heads.zero_grad()


@contextlib.contextmanager
def _registered(model: nn.Module, heads: nn.ModuleDict) -> Any:
    """Lets the parent find the heads among the model's parameters while it makes the optimizer."""
    model.add_module("local_heads", heads)
    try:
        yield
    finally:
        del model._modules["local_heads"]


def _set_learning_rate(optimizer: torch.optim.Optimizer, members: set[int], learning_rate: float) -> None:
    """Moves some parameters, given by `id`, to groups of their own that have another learning rate."""
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in members]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in members]
            optimizer.add_param_group({**group, "params": chosen, "lr": learning_rate})
