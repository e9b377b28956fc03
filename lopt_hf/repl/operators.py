"""The operators that can stand in a removed layer's place, ours and the paper's, as maths on the neighbours' weights.

Each is a module that owns its coefficients only. At every forward it synthesises the tensors of a `FoldedSurrogate`
from them and from the two neighbours, and runs that; folding keeps the tensors.

Shapes: N tokens, D hidden channels, P width of the concatenated heads, H heads, K branches, I inner width of the MLP.
"""

from typing import Any

import torch
from torch import nn

from lopt_hf.repl.config import RepLConfig
from lopt_hf.repl.convolution import Convolution
from lopt_hf.repl.map_operators import DownProj, Patch, Refit, Scale
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

__all__ = ["Branches", "Head", "HeadMLP", "Linear", "MeanMLP", "Projection", "make_operator", "prior_of"]


class Branches(Operator):
    """`branches` (ours): `X` plus a combination of branches of the same input, folded to a scale, one map, one MLP.

    Args:
        previous: The layer before.
        following: The layer after.
        branches: Which ones, see `RepLConfig.branches`.
        granularity: `"channel"`, `"head"` or `"scalar"`.
    """

    def __init__(self, previous: Neighbour, following: Neighbour, branches: list[str], granularity: str) -> None:
        if "output" in branches:
            check_square("branches=['output']", previous)
        self.names = [name for branch in branches for name in _neighbours_of(branch)]
        is_linear = bool({"value", "output"} & set(branches))
        output, value, norm = previous.output(), previous.value(), previous.attention_norm()
        biases = [output.bias, norm.bias, *([value.bias] if "value" in branches else [])]
        has_bias = any(bias is not None for bias in biases)
        mlp = mlp_spec(previous) if "mlp" in branches else None
        spec = make_spec(
            previous, scale="identity" in branches, linear=is_linear, bias=is_linear and has_bias, mlp=mlp
        )
        super().__init__(spec)
        self.granularity = granularity
        self.per_channel = granularity == "channel"
        sizes = {"channel": spec["hidden_size"], "head": previous.num_heads, "scalar": 1}
        self.coefficients = nn.Parameter(output.weight.new_zeros(len(self.names), sizes[granularity]))

    def start_as_paper(self, previous: Neighbour, following: Neighbour) -> None:
        """Half of each neighbour's value path and the whole mean MLP: the paper's coefficients, where it has them."""
        start = {"previous value": 0.5, "following value": 0.5, "mlp": 1.0}
        for row, name in zip(self.coefficients.data, self.names, strict=True):
            row.fill_(start.get(name, 0.0))

    def synthesise(self, previous: Neighbour, following: Neighbour) -> Tensors:
        tensors: Tensors = {}
        maps: list[Affine] = []
        for name, coefficient in zip(self.names, self.coefficients, strict=True):
            per_channel = coefficient.expand(self.spec["hidden_size"]) if self.granularity != "head" else coefficient
            if name == "identity":
                tensors["scale"] = per_channel
            elif name == "mlp":
                tensors |= mean_mlp(previous, following, per_channel)
            else:
                maps.append(self._path(name, previous, following, coefficient))
        if maps:
            biases = [path.bias for path in maps if path.bias is not None]
            bias = torch.stack(biases).sum(0) if biases else None
            tensors |= tensors_of("linear", Affine(torch.stack([path.weight for path in maps]).sum(0), bias))
        return tensors

    def _path(self, name: str, previous: Neighbour, following: Neighbour, coefficient: torch.Tensor) -> Affine:
        """One linear branch times its coefficients, on the plainly normalised input."""
        side, kind = name.split()
        neighbour = previous if side == "previous" else following
        output, norm = neighbour.output(), neighbour.attention_norm()
        if self.granularity != "head":
            path = norm.into(output) if kind == "output" else neighbour.value_path()
            return path.scaled(coefficient)
        columns = coefficient.repeat_interleave(output.weight.shape[1] // len(coefficient))
        bias = None if output.bias is None else output.bias * coefficient.mean()
        by_head = Affine(output.weight * columns, bias)
        return norm.into(by_head) if kind == "output" else by_head.after(norm.into(neighbour.value()))

    def branch_outputs(self, h_ND: torch.Tensor, previous: Neighbour, following: Neighbour) -> torch.Tensor:
        x_ND = normalise(h_ND, self.spec["norm"], self.spec["eps"])
        outputs: list[torch.Tensor] = []
        for name in self.names:
            if name == "identity":
                outputs.append(h_ND)
            elif name == "mlp":
                outputs.append(run_mean_mlp(self, h_ND, previous, following))
            else:
                outputs += [self._path(name, previous, following, one)(x_ND) for one in self._units()]
        return torch.stack(outputs)

    def _units(self) -> list[torch.Tensor]:
        """Coefficients that pick one feature of a branch each: its heads, or all of it."""
        size = self.coefficients.shape[1]
        like = self.coefficients.data
        return list(torch.eye(size).to(like)) if self.granularity == "head" else [like.new_ones(size)]


def _neighbours_of(branch: str) -> list[str]:
    return [f"previous {branch}", f"following {branch}"] if branch in ("value", "output") else [branch]


class Linear(Operator):
    """`linear` (ours): `X + norm(X) W^T + b`, with a W and b of its own that start from the neighbours' value paths.

    It reads no neighbour after its start, so that its forward costs what it costs when folded.
    """

    def __init__(self, previous: Neighbour, following: Neighbour) -> None:
        super().__init__(make_spec(previous, linear=True, bias=True))
        size = self.spec["hidden_size"]
        self.coefficients = nn.Parameter(previous.output().weight.new_zeros(size, size))
        self.bias = nn.Parameter(self.coefficients.new_zeros(size))

    def synthesise(self, previous: Neighbour, following: Neighbour) -> Tensors:
        return {"linear.weight": self.coefficients, "linear.bias": self.bias}

    def start_as_paper(self, previous: Neighbour, following: Neighbour) -> None:
        """Half of each neighbour's value path."""
        self.start_from(prior_of(previous, following, torch.full_like(self.bias.data, 0.5).expand(2, -1)))

    def start_from(self, affine: Affine) -> None:
        """Sets the map."""
        self.coefficients.data.copy_(affine.weight)
        self.bias.data.zero_()
        if affine.bias is not None:
            self.bias.data.copy_(affine.bias)

    def start_as_skip(self) -> None:
        """A map of 0."""
        super().start_as_skip()
        self.bias.data.zero_()


@torch.no_grad()
def prior_of(previous: Neighbour, following: Neighbour, coefficients_KD: torch.Tensor) -> Affine:
    """Both neighbours' value paths, each times its coefficients: what `Linear` is fitted towards."""
    branches = Branches(previous, following, ["value"], "channel")
    branches.coefficients.data.copy_(coefficients_KD)
    tensors = branches.synthesise(previous, following)
    return Affine(tensors["linear.weight"], tensors.get("linear.bias"))


# ---- The paper's (RepL, arXiv 2605.19533) ----


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
        weights = (neighbour.output().weight for neighbour in (previous, following))
        return [nn.functional.normalize(weight_DP, dim=1) * scale for weight_DP in weights]

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


def make_operator(config: RepLConfig, previous: Any, following: Any) -> Operator:
    """The operator that a config names, between two neighbours: `Neighbour`, or `ConvNeighbour` for `conv`.

    Raises:
        ValueError: If the neighbours differ in shape, or if the operator needs a square output projection.
    """
    maps: dict[str, Any] = {"down_proj": DownProj, "refit": Refit, "scale": Scale, "patch": Patch}
    if config.operator in maps:
        return maps[config.operator](previous, following)
    if previous.shapes() != following.shapes():
        names = [name for name, shape in previous.shapes().items() if following.shapes().get(name) != shape]
        raise ValueError(
            f"The neighbours of a layer to replace differ in shape ({names[0] if names else 'their weights'}): "
            "RepL needs two of one kind; choose other layers with layers_to_replace or spans."
        )
    if config.operator == "branches":
        return Branches(previous, following, config.branches, config.coefficients)
    kinds: dict[str, Any] = {
        "linear": Linear,
        "proj": Projection,
        "head": Head,
        "mlp": MeanMLP,
        "head+mlp": HeadMLP,
        "conv": Convolution,
    }
    return kinds[config.operator](previous, following)
