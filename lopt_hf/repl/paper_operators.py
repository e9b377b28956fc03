"""The paper's operators (RepL, arXiv 2605.19533): `proj`, `head`, `mlp`, and `head+mlp` in sequence.

Shapes: N tokens, D hidden channels, P width of the concatenated heads, H heads, K branches, I inner width of the MLP.
"""

import torch
from torch import nn

from lopt_hf.repl.modeling_repl import normalise
from lopt_hf.repl.neighbours import Affine, Neighbour, NormWeights
from lopt_hf.repl.operator_base import (
    Operator,
    Tensors,
    check_square,
    make_spec,
    mean,
    mean_mlp,
    mlp_spec,
    run_mean_mlp,
    tensors_of,
)

__all__ = ["Head", "HeadMLP", "MeanMLP", "Projection"]


class Projection(Operator):
    """`proj` (paper, Eq 19-21): `X + X W^T + b`, W and b of the output projections, alpha and beta beside them."""

    def __init__(self, previous: Neighbour, following: Neighbour) -> None:
        check_square("operator='proj'", previous)
        output = previous.output()
        super().__init__(make_spec(previous, norm="none", linear=True, bias=output.bias is not None))
        self.coefficients = nn.Parameter(output.weight.new_zeros(2, 1))

    def synthesise(self, previous: Neighbour, following: Neighbour) -> Tensors:
        (alpha,), (beta,) = self.coefficients
        a, b = previous.output(), following.output()
        bias = None if a.bias is None or b.bias is None else alpha * a.bias + beta * b.bias
        return tensors_of("linear", Affine(alpha * a.weight + beta * b.weight, bias))

    def branch_outputs(self, h_ND: torch.Tensor, previous: Neighbour, following: Neighbour) -> torch.Tensor:
        return torch.stack([previous.output()(h_ND), following.output()(h_ND)])


def _unit_rows(weight_DP: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(weight_DP, dim=1)


class Head(Operator):
    """`head` (paper, Eq 22-24): `X + d^(-1/2) LN(X) W^T + b`, one alpha and beta for each head's columns."""

    def __init__(self, previous: Neighbour, following: Neighbour, mlp: bool = False) -> None:
        check_square(f"operator={'head+mlp' if mlp else 'head'!r}", previous)
        output, norm = previous.output(), previous.attention_norm()
        has_bias = output.bias is not None or norm.bias is not None
        inner = mlp_spec(previous) if mlp else None
        super().__init__(make_spec(previous, linear=True, bias=has_bias, mlp=inner, sequential=mlp))
        self.coefficients = nn.Parameter(output.weight.new_zeros(2, previous.num_heads))

    def _bases(self, previous: Neighbour, following: Neighbour) -> list[torch.Tensor]:
        scale = self.spec["hidden_size"] ** -0.5
        return [_unit_rows(neighbour.output().weight) * scale for neighbour in (previous, following)]

    def synthesise(self, previous: Neighbour, following: Neighbour) -> Tensors:
        bases = self._bases(previous, following)
        head_size = bases[0].shape[1] // self.coefficients.shape[1]
        columns = self.coefficients.repeat_interleave(head_size, dim=1)
        weight = bases[0] * columns[0] + bases[1] * columns[1]
        bias = mean(previous.output().bias, following.output().bias)
        return tensors_of("linear", previous.attention_norm().into(Affine(weight, bias)))

    def branch_outputs(self, h_ND: torch.Tensor, previous: Neighbour, following: Neighbour) -> torch.Tensor:
        norm, heads = previous.attention_norm(), self.coefficients.shape[1]
        x_ND = _apply_norm(norm, normalise(h_ND, self.spec["norm"], self.spec["eps"]))
        x_HNd = x_ND.view(len(x_ND), heads, -1).transpose(0, 1)
        outputs = [
            x_HNd @ base.view(base.shape[0], heads, -1).permute(1, 2, 0) for base in self._bases(previous, following)
        ]
        return torch.cat(outputs)

    def offset(self, h_ND: torch.Tensor, previous: Neighbour, following: Neighbour) -> torch.Tensor:
        bias = mean(previous.output().bias, following.output().bias)
        return torch.zeros_like(h_ND) if bias is None else bias.expand_as(h_ND)


def _apply_norm(norm: NormWeights, x_ND: torch.Tensor) -> torch.Tensor:
    x_ND = x_ND if norm.weight is None else x_ND * norm.weight
    return x_ND if norm.bias is None else x_ND + norm.bias


class MeanMLP(Operator):
    """`mlp` (paper, Eq 25-27): `X + MLP_mean(LN(X))`. It has no coefficients."""

    def __init__(self, previous: Neighbour, following: Neighbour) -> None:
        super().__init__(make_spec(previous, mlp=mlp_spec(previous)))

    def synthesise(self, previous: Neighbour, following: Neighbour) -> Tensors:
        return mean_mlp(previous, following)

    def start_as_paper(self, previous: Neighbour, following: Neighbour) -> None:
        """Nothing to set."""


class HeadMLP(Head):
    """`head+mlp`: `head`, then `mlp` on what it gives, as in a pre-norm layer (our reading of the paper)."""

    def __init__(self, previous: Neighbour, following: Neighbour) -> None:
        super().__init__(previous, following, mlp=True)

    def synthesise(self, previous: Neighbour, following: Neighbour) -> Tensors:
        return {**super().synthesise(previous, following), **mean_mlp(previous, following)}

    def offset(self, h_ND: torch.Tensor, previous: Neighbour, following: Neighbour) -> torch.Tensor:
        mlp_ND = run_mean_mlp(self, h_ND, previous, following)
        return super().offset(h_ND, previous, following) + mlp_ND
