"""The forward and the local backward of one micro-batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lopt_hf.local.boundary import GradientBoundary
from lopt_hf.trainers.local_step import LocalStepMixin

__all__ = ["LocalLossMixin"]


class LocalLossMixin(LocalStepMixin):
    """Runs a micro-batch with the boundary switched on, and logs each early block's loss."""

    boundary: GradientBoundary
    _metrics: dict[str, Any]  # TRL's

    def _run_local_backward(self, index: int, loss: torch.Tensor) -> None:
        steps_now = self.args.local_step and self.accelerator.sync_gradients
        if steps_now:
            self._check_first_backward(index)
        is_averaged = self._reduces_early_gradients() and self.accelerator.sync_gradients
        if is_averaged and len(self.boundary.losses[index]) > 1:
            self._reducer.wait()  # before a further forward of this micro-batch adds to what is being averaged
        self.accelerator.backward(loss)
        if is_averaged:
            self._reducer.start(self._learners()[index])
        if steps_now:
            self._step_early_block(index)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        steps = self.current_gradient_accumulation_steps
        scale = self._local_scale(inputs, num_items_in_batch)
        with self.boundary.training_forward(self._run_local_backward, scale, self._updates_early_blocks(), inputs):
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.boundary.check_task_loss(result[0] if return_outputs else result)
        joint_loss = self.boundary.joint_loss()
        if joint_loss is None:
            return result
        joint_loss = joint_loss / steps if self._is_scaled(num_items_in_batch) else joint_loss
        return (result[0] + joint_loss, result[1]) if return_outputs else result + joint_loss

    def _local_scale(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None) -> float:
        """Factor of the eager local losses, each a mean over the micro-batch: all micro-batches weigh the same."""
        return 1 / self.current_gradient_accumulation_steps

    def _updates_early_blocks(self) -> bool:
        return self.args.train_early_blocks and self.state.global_step % self.args.local_update_interval == 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._check_finite("loss", loss.item())
        self._log_local_losses()
        return loss

    def _is_scaled(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether the task loss is already divided by the accumulation steps; `Trainer` divides one that is not."""
        if self.loss_is_scaled_for_ga is not None:  # DPO: no; GRPO: yes
            return self.loss_is_scaled_for_ga
        return (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        ) or self.compute_loss_func is not None

    def _log_local_losses(self) -> None:
        if not any(self.boundary.losses.values()):
            return
        self._log_losses({f"block_{index}": losses for index, losses in self.boundary.losses.items()})

    def _log_losses(self, losses: Mapping[str, list[torch.Tensor]]) -> None:
        """Logs the mean of each list over all ranks as `local_loss/<name>`."""
        means = torch.stack([torch.stack(values).mean().to(self.args.device) for values in losses.values()])
        for name, value in zip(losses, self.accelerator.reduce(means, reduction="mean").tolist(), strict=True):
            self._check_finite(f"local_loss/{name}", value)
            self._metrics["train"][f"local_loss/{name}"].append(value)
