"""Healing with the removed layers' outputs as targets beside the task loss."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer

from lopt_hf.repl.model import RepLModel

__all__ = ["DistillationMixin", "RepLTrainer"]

# The mixin stands before a trainer in the list of base classes; a type checker is told that it is one.
if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


class DistillationMixin(TrainerBase):
    """Adds `distillation_weight` times the surrogates' distance from the removed layers to a trainer's loss.

    The distance is each token's mean square error relative to what the removed layer adds, averaged over tokens
    (padding included) and surrogates; it is logged as `distillation_loss`. Weight 0 leaves the trainer as it is.
    """

    model: Any
    _metrics: dict[str, Any]  # TRL's

    def _repl_model(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model if isinstance(model, PreTrainedModel) else model.get_base_model()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Adds the weighted distance to the trainer's loss."""
        repl_model = self._repl_model()
        weight = repl_model.config.repl["config"]["distillation_weight"]
        if weight == 0 or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hooks = repl_model.hooks
        for hook in hooks:
            hook.measures = True
        try:
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            distance = torch.stack([hook.distance for hook in hooks]).mean()
        finally:
            for hook in hooks:
                hook.measures, hook.distance = False, None
        self._metrics["train"]["distillation_loss"].append(distance.item())
        # As TRL scales the auxiliary loss of MoE models: with `num_items_in_batch` Trainer leaves it to the loss.
        share = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        added = weight * distance / share
        return (result[0] + added, result[1]) if return_outputs else result + added


class RepLTrainer(DistillationMixin, SFTTrainer):
    """`SFTTrainer` for a `RepLModel`, with `RepLConfig.distillation_weight`.

    Without that weight any trainer does: `SFTTrainer` itself, or `LoPTTrainer`.

    Args:
        model: What `get_repl_model` returned.
        *args: As for `SFTTrainer`.
        **kwargs: As for `SFTTrainer`.

    Raises:
        ValueError: If the model is no `RepLModel`, or was loaded without its removed layers while
            `distillation_weight` asks for them.
    """

    _tag_names = ["trl", "sft", "repl"]
    _name = "RepL"

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, RepLModel):
            name = model if isinstance(model, str) else type(model).__name__
            raise ValueError(f"model={name} is no unfolded RepL model; pass what get_repl_model returns.")
        if model.config.repl["config"]["distillation_weight"] > 0 and any(
            hook.teacher is None for hook in model.hooks
        ):
            raise ValueError(
                "distillation_weight > 0, but the removed layers are not saved with a model and this one was loaded "
                "without them; call get_repl_model on the stock model, or set distillation_weight to 0 in its config."
            )
        super().__init__(model, *args, **kwargs)  # type: ignore[arg-type]
