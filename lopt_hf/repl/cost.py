"""Cost of a surrogate relative to the layer that it replaces."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lopt_hf.repl.modeling_repl import FoldedSurrogate
from lopt_hf.repl.operator_base import Operator

__all__ = ["SurrogateCost", "cost_of", "layer_cost"]


@dataclass(frozen=True)
class SurrogateCost:
    """Parameters and multiply-adds per token of one surrogate and of its removed layer.

    Attributes:
        layer: Number of the removed layer, from 0.
        parameters: Of the folded surrogate.
        coefficients: What the unfolded one owns and trains.
        multiply_adds: Of the folded surrogate, in its matrices.
        removed_parameters: Of the removed layer.
        removed_multiply_adds: Of the removed layer, in its matrices; the attention scores, which grow with the
            context, come on top.
    """

    layer: int
    parameters: int
    coefficients: int
    multiply_adds: int
    removed_parameters: int
    removed_multiply_adds: int

    @property
    def ratio(self) -> float:
        """The surrogate's multiply-adds per token relative to the removed layer's."""
        return self.multiply_adds / self.removed_multiply_adds


def layer_cost(layer: nn.Module) -> tuple[int, int]:
    """Parameters, and multiply-adds per token, of a layer or a folded surrogate: each matrix entry is used once."""
    parameters = list(layer.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.ndim == 2)


def cost_of(layer: int, operator: Operator, removed: Sequence[int]) -> SurrogateCost:
    """The cost of one surrogate.

    Args:
        layer: Number of the removed layer.
        operator: What stands in its place.
        removed: `layer_cost` of the removed layer.
    """
    folded: FoldedSurrogate = operator._folded[0]
    parameters, multiply_adds = layer_cost(folded)
    coefficients = sum(parameter.numel() for parameter in operator.parameters())
    return SurrogateCost(layer, parameters, coefficients, multiply_adds, *removed)
