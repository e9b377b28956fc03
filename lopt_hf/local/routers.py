"""The routers of a mixture of experts: each block learns to balance its own.

Shapes: B batch, T tokens.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lopt_hf.common.upstream.transformers import active_collector

__all__ = ["RouterLogits", "count_absent_routers", "count_routers", "with_gradient_times"]


def with_gradient_times(factor: float, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor as it is, whose gradient is multiplied on its way back."""
    if factor == 1.0 or not tensor.requires_grad:
        return tensor
    view = tensor.view_as(tensor)
    view.register_hook(lambda gradient: gradient * factor)
    return view


def count_routers(model: PreTrainedModel, within: nn.Module | None = None) -> int:
    """Counts the modules whose router logits a model collects.

    Args:
        model: A `transformers` causal language model.
        within: Its module in which they are counted. Default: all of it.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    recorded = [each.can_record_outputs.get("router_logits", []) for each in models]
    listed = [recorder for own in recorded for recorder in (own if isinstance(own, list) else [own])]
    kinds = [getattr(recorder, "target_class", recorder) for recorder in listed]
    routers = tuple(kind for kind in kinds if isinstance(kind, type))
    return sum(isinstance(module, routers) for module in (within or model).modules())


def count_absent_routers(model: PreTrainedModel) -> int:
    """Counts the routers that a stage of a pipeline has left to others, as the stand-ins for their layers tell."""
    return sum(getattr(module, "num_absent_routers", 0) for module in model.modules())


class RouterLogits:
    """The router logits that a model collects in a forward, shared out between the blocks and the task loss.

    What the model has collected is in the task loss. A boundary says what becomes of that of the routers that have run
    since the boundary before.

    Attributes:
        num_routers: Those of the whole model, of which a stage has a part.

    Args:
        model: A `transformers` causal language model (of a `PeftModel`, its base model).
        num_layers: Its decoder layers.
        coefficient: Weight of the load-balancing loss; 0 where the model has no routers.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int, coefficient: float) -> None:
        self.model = model
        self.coefficient = coefficient
        # Some layers may be dense. A model that does not say which modules its routers are has one in each layer.
        self.num_routers = count_routers(model) + count_absent_routers(model) or num_layers
        self._seen = 0  # those of the blocks before

    def begin_forward(self) -> None:
        """Begins a forward of the decoder."""
        self._seen = 0

    def leave_to_task(self, factor: float = 1.0) -> None:
        """Leaves a block's load-balancing loss to the task loss.

        Args:
            factor: By which its gradient is multiplied.
        """
        logits = self._collected()
        logits[self._seen :] = [with_gradient_times(factor, own) for own in logits[self._seen :]]
        self._seen = len(logits)

    def leave_leaves_to_task(self) -> list[torch.Tensor]:
        """Leaves a block's load-balancing loss to the task loss, which hands its gradient back to the leaves returned.

        They are for a block that runs again with a graph.
        """
        logits = self._collected()
        own = [layer_logits.detach().requires_grad_() for layer_logits in logits[self._seen :]]
        logits[self._seen :] = own
        self._seen = len(logits)
        return own

    def own_loss(self, mask_BT: torch.Tensor | None) -> torch.Tensor | None:
        """Returns a block's load-balancing loss, which is to join its local loss; the task loss sees detached logits.

        Args:
            mask_BT: Which tokens are none of padding, if some are.

        Returns:
            The loss, with the weight per router that it has in end-to-end training; `None` without routers.
        """
        logits = self._collected()
        if not logits or self.coefficient == 0.0:
            return None
        own = tuple(logits[self._seen :])
        self._seen = len(logits)
        logits[:] = [layer_logits.detach() for layer_logits in logits]
        return self.loss_of(own, mask_BT)

    def loss_of(self, logits: tuple[Any, ...], mask_BT: torch.Tensor | None) -> torch.Tensor:
        """Returns the load-balancing loss of some layers' routers, with their weight in end-to-end training.

        Args:
            logits: Each layer's.
            mask_BT: Which tokens are none of padding, if some are.
        """
        config = self.model.config.get_text_config(decoder=True)
        share = self.coefficient * len(logits) / self.num_routers
        # The model knows it where the config has another name for it (DeepSeek-V4).
        experts = vars(self.model).get("num_experts") or config.num_experts
        loss = load_balancing_loss_func(logits, experts, config.num_experts_per_tok, mask_BT)
        return share * torch.as_tensor(loss)

    def _collected(self) -> list[torch.Tensor]:
        """The logits of the routers that have run in this forward, if they are collected."""
        collected: dict[str, Any] = active_collector.get() or {}
        return collected.get("router_logits", [])
