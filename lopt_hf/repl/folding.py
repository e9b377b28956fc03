"""Surrogates folded into weights that a stock model has."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lopt_hf.repl.map_operators import DownProj, MLPMap, Refit, Scale
from lopt_hf.repl.neighbours import Neighbour
from lopt_hf.repl.operator_base import Operator
from lopt_hf.repl.surgery import detach, detach_from_mlp

__all__ = ["add_to_projection", "fold"]


@torch.no_grad()
def fold(operator: Operator, previous: Neighbour, behind: Sequence[Neighbour]) -> None:
    """Folds a surrogate into the model's weights, in place, and takes it out.

    Args:
        operator: One of those that fold, see `Operator.is_stock`.
        previous: The layer before the removed ones.
        behind: All layers behind them, in order.

    Raises:
        ValueError: If there are adapters on the weights.
    """
    for neighbour in (previous, *behind):
        if any(isinstance(module, BaseTunerLayer) for module in neighbour.layer.modules()):
            raise ValueError("model=PeftModel has adapters; merge them with its own merge_and_unload() first.")
    if isinstance(operator, MLPMap):
        detach_from_mlp(previous, operator)
        if isinstance(operator, DownProj):
            _map_down(previous, operator)
        elif isinstance(operator, Refit):
            add_to_projection(previous.down_module(), operator.coefficients, operator.bias)
    elif isinstance(operator, Scale):
        detach(behind[0].layer)
        factor = 1 / (1 + operator.coefficients[0, 0].double())
        for neighbour in behind:
            for tensor, offset in _writers(neighbour):
                tensor.copy_((tensor.double() + offset) * factor - offset)


def _map_down(previous: Neighbour, operator: MLPMap) -> None:
    """`W` becomes `(I + T) W`, and `b` becomes `(I + T) b + c`; of every expert, where there are some."""
    map_DD = operator.coefficients.double()
    if previous.experts is not None:
        packed: Any = previous.experts.down_proj
        packed += (map_DD @ packed.double()).to(packed)
        return
    module: Any = previous.down_module()
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    weight += (map_DD @ weight.double()).to(weight)
    if operator.bias is not None:
        module.bias += (map_DD @ module.bias.double() + operator.bias.double()).to(module.bias)


@torch.no_grad()
def add_to_projection(projection: Any, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
    """Adds to the weights of a linear layer, or of GPT-2's, whose weight is transposed."""
    projection.weight += weight_OI.T if isinstance(projection, Conv1D) else weight_OI
    if bias_O is not None:
        projection.bias += bias_O


def _writers(neighbour: Neighbour) -> Iterator[tuple[torch.Tensor, float]]:
    """What a layer's additions to the residual stream are proportional to: tensors, and what to add to each first."""
    layout = neighbour.layout
    if layout.post_mlp_norm is not None and layout.post_attention_norm is not None:
        for path in (layout.post_attention_norm, layout.post_mlp_norm):
            yield neighbour.layer.get_submodule(path).weight, layout.norm_offset  # type: ignore[misc]
        return
    modules: list[nn.Module] = [neighbour.layer.get_submodule(layout.output)]
    if neighbour.experts is not None:
        yield neighbour.experts.down_proj, 0.0  # type: ignore[misc]
    else:
        modules.append(neighbour.down_module())
    for module in modules:
        yield module.weight, 0.0  # type: ignore[misc]
        if module.bias is not None:
            yield module.bias, 0.0  # type: ignore[misc]
