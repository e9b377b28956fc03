"""What all operators share: the module, the tensors that several of them synthesise, and what a surrogate costs.

Shapes: N tokens, D hidden channels, P width of the concatenated heads, H heads, K branches, I inner width of the MLP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lopt_hf.repl.modeling_repl import make_folded
from lopt_hf.repl.neighbours import Affine, Neighbour

__all__ = [
    "Operator",
    "SurrogateCost",
    "Tensors",
    "check_square",
    "cost_of",
    "layer_cost",
    "make_spec",
    "mean",
    "mean_affine",
    "mean_mlp",
    "mlp_spec",
    "run_mean_mlp",
    "tensors_of",
]

Tensors = dict[str, torch.Tensor]


class Operator(nn.Module):
    """A surrogate whose weights follow from its neighbours'.

    Args:
        spec: What it folds to, see `FoldedSurrogate` and `FoldedConvolution`.

    Attributes:
        coefficients: What it owns and trains, `(K, size)`; none in `MeanMLP`.
        per_channel: Whether a branch has a coefficient for each channel; else each `(branch, size)` entry is one
            feature of all channels.
        is_stock: Whether it folds into weights that a stock model has.
    """

    coefficients: nn.Parameter
    per_channel = False
    is_stock = False

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        with torch.device("meta"):  # in a tuple: its weights are synthesised, they are not this module's
            self._folded = (make_folded(spec),)

    @property
    def spec(self) -> dict[str, Any]:
        """What it folds to."""
        return self._folded[0].spec

    def synthesise(self, previous: Neighbour, following: Neighbour) -> Tensors:
        """The tensors of what it folds to."""
        raise NotImplementedError

    def branch_outputs(self, h_ND: torch.Tensor, previous: Neighbour, following: Neighbour) -> torch.Tensor:
        """What each branch adds to `h` at coefficient 1: (K, N, D), or (K * size, N, D) unless `per_channel`."""
        raise NotImplementedError

    def offset(self, h_ND: torch.Tensor, previous: Neighbour, following: Neighbour) -> torch.Tensor:
        """What is added whatever the coefficients are; for `HeadMLP` to first order."""
        return torch.zeros_like(h_ND)

    def start_as_paper(self, previous: Neighbour, following: Neighbour) -> None:
        """Half of each neighbour."""
        self.coefficients.data.fill_(0.5)

    def start_as_skip(self) -> None:
        """Coefficients of 0."""
        self.coefficients.data.zero_()

    def forward(self, h_BTD: torch.Tensor, previous: Neighbour, following: Neighbour) -> torch.Tensor:
        with torch.autocast(h_BTD.device.type, enabled=False):  # weights are made in their own precision
            tensors = self.synthesise(previous, following)
        return functional_call(self._folded[0], tensors, (h_BTD,))


def make_spec(neighbour: Neighbour, **changes: Any) -> dict[str, Any]:
    """Makes the spec of a `FoldedSurrogate` that adds nothing, with some changes.

    Args:
        neighbour: A neighbour, whose sizes and norm it has.
        **changes: Entries of the spec that differ.
    """
    spec = {
        "hidden_size": neighbour.output().weight.shape[0],
        "norm": neighbour.norm_kind,
        "eps": neighbour.norm_eps,
        "scale": False,
        "linear": False,
        "bias": False,
        "mlp": None,
        "sequential": False,
    }
    return {**spec, **changes}


def mlp_spec(neighbour: Neighbour) -> dict[str, Any]:
    """Makes the spec of a `FoldedMLP` like a neighbour's MLP."""
    mlp = neighbour.mlp()
    return {
        "norm": neighbour.norm_kind,
        "eps": neighbour.norm_eps,
        "intermediate_size": mlp.up.weight.shape[0],
        "gated": mlp.gate is not None,
        "bias": mlp.norm.into(mlp.up).bias is not None,
        "down_bias": mlp.down.bias is not None,
        "post_norm": mlp.post_norm is not None,
        "activation": neighbour.activation,
    }


def mean(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the mean of two tensors; `None` if one is missing."""
    return None if a is None or b is None else (a + b) / 2


def mean_affine(a: Affine, b: Affine) -> Affine:
    """Returns the mean of two linear maps."""
    return Affine((a.weight + b.weight) / 2, mean(a.bias, b.bias))


def tensors_of(name: str, affine: Affine) -> Tensors:
    """Returns a linear map's tensors under the names that they have in a module called `name`."""
    weight = {f"{name}.weight": affine.weight}
    return weight if affine.bias is None else {**weight, f"{name}.bias": affine.bias}


def mean_mlp(previous: Neighbour, following: Neighbour, scale: torch.Tensor | None = None) -> Tensors:
    """The mean of the neighbours' MLPs behind the previous one's norm (paper, Eq 25-27), its output scaled."""
    a, b = previous.mlp(), following.mlp()
    down, post_norm = mean_affine(a.down, b.down), a.post_norm
    if scale is not None and post_norm is None:
        down = down.scaled(scale)
    tensors = {**tensors_of("mlp.up", a.norm.into(mean_affine(a.up, b.up))), **tensors_of("mlp.down", down)}
    if a.gate is not None and b.gate is not None:
        tensors |= tensors_of("mlp.gate", a.norm.into(mean_affine(a.gate, b.gate)))
    if post_norm is not None and post_norm.weight is not None:
        tensors["mlp.post_norm"] = post_norm.weight if scale is None else post_norm.weight * scale
    return tensors


def run_mean_mlp(operator: Operator, h_ND: torch.Tensor, previous: Neighbour, following: Neighbour) -> torch.Tensor:
    """Runs the mean of the neighbours' MLPs, without adding it to `h_ND`."""
    mlp: Any = operator._folded[0].mlp
    tensors = {name.removeprefix("mlp."): tensor for name, tensor in mean_mlp(previous, following).items()}
    return functional_call(mlp, tensors, (h_ND,))


def check_square(name: str, neighbour: Neighbour) -> None:
    """Checks that a neighbour's output projection is square.

    Args:
        name: What needs it, for the error.
        neighbour: The neighbour.

    Raises:
        ValueError: If it is not.
    """
    rows, columns = neighbour.output().weight.shape
    if rows != columns:
        raise ValueError(
            f"{name} applies the attention's output projection to the hidden states, but it is {rows} x {columns} "
            "(head size x heads differs from the hidden size); use operator 'linear', or 'branches' without 'output'."
        )


@dataclass(frozen=True)
class SurrogateCost:
    """Parameters and multiply-adds per token, or place of a feature map, of one surrogate and its removed layers.

    Attributes:
        layer: Number of the first removed layer, from 0.
        parameters: Of the folded surrogate.
        coefficients: What the unfolded one owns and trains.
        multiply_adds: Of the folded surrogate, in its matrices.
        removed_parameters: Of the removed layers.
        removed_multiply_adds: Of the removed layers, in their matrices; the attention scores, which grow with the
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
        """The surrogate's multiply-adds per token relative to the removed layers'."""
        return self.multiply_adds / self.removed_multiply_adds


def layer_cost(layer: nn.Module, experts_per_token: int = 1) -> tuple[int, int]:
    """Parameters, and multiply-adds per token, of a layer or a folded surrogate: each matrix entry is used once.

    So is each entry of a kernel (out, in, height, width) at every place of a feature map.

    A surrogate that the layer carries for another one does not count.

    Args:
        layer: The layer.
        experts_per_token: How many of its experts a token goes through, whose matrices are packed as (E, out, in).
    """
    parameters = [p for name, p in layer.named_parameters() if not name.startswith("surrogate.")]
    used = sum(p.numel() for p in parameters if p.ndim in (2, 4))
    used += sum(p.numel() // len(p) * experts_per_token for p in parameters if p.ndim == 3)
    return sum(p.numel() for p in parameters), used


def cost_of(layer: int, operator: Operator, removed: Sequence[int]) -> SurrogateCost:
    """The cost of one surrogate.

    Args:
        layer: Number of the first removed layer.
        operator: What stands in their place.
        removed: `layer_cost` of the removed layers together.
    """
    parameters, multiply_adds = (0, 0) if operator.is_stock else layer_cost(operator._folded[0])
    coefficients = sum(parameter.numel() for parameter in operator.parameters())
    return SurrogateCost(layer, parameters, coefficients, multiply_adds, *removed)
