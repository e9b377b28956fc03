"""Operators that read no weights of the neighbours: maps of what a span of layers is given, fitted to its output.

Three of them fold into weights that a stock model has (`STOCK_OPERATORS`). For those of ReplaceMe and of ours the
surrogate sits in the MLP of the layer before the span and adds to what that MLP writes to the residual stream; the
others stand in front of the layer behind the span, as RepL's do.

Shapes: N tokens, D hidden channels, K inputs of a map (D, or the MLP's inner width).
"""

import math
from typing import Any

import numpy as np
import torch
from scipy import fft, linalg
from torch import nn

from lopt_hf.repl.neighbours import Neighbour
from lopt_hf.repl.operator_base import Operator, Tensors, make_spec

__all__ = ["DownProj", "MLPMap", "Patch", "Refit", "Scale", "rotation"]


class MLPMap(Operator):
    """A linear map whose output is added to that of the MLP before the span, in front of the residual sum.

    Args:
        previous: The layer before the span.
        following: The layer behind it.
        num_inputs: K.

    Attributes:
        reads_input: Whether it maps the input of the MLP's last projection; else the MLP's output.
    """

    is_stock = True
    reads_input = False

    def __init__(self, previous: Neighbour, following: Neighbour, num_inputs: int) -> None:
        super().__init__(make_spec(previous))
        like = previous.output().weight
        self.coefficients = nn.Parameter(like.new_zeros(like.shape[0], num_inputs))
        # A constant is for families whose projection has one: elsewhere there is no weight to fold it into.
        has_bias = previous.has_down_bias
        self.bias = nn.Parameter(like.new_zeros(like.shape[0])) if has_bias else None

    def forward(self, x: torch.Tensor, *neighbours: Neighbour) -> torch.Tensor:
        """What is added, from what is read."""
        return nn.functional.linear(x, self.coefficients, self.bias)

    def start_as_skip(self) -> None:
        """A map of 0."""
        super().start_as_skip()
        if self.bias is not None:
            self.bias.data.zero_()

    def place(self, previous: Neighbour) -> nn.Module:
        """The module behind which the map's output is added."""
        return previous.mlp_output()


class DownProj(MLPMap):
    """`down_proj`: `h + M T^T + b` for a layer with `h = Y + M`, M the MLP's output (ReplaceMe, arXiv 2505.02819).

    It folds to `(I + T) W`, W the layer's down projection; of a mixture of experts that of every expert, whose outputs
    are summed with weights that do not depend on it.
    """

    def __init__(self, previous: Neighbour, following: Neighbour) -> None:
        previous.check_down("down_proj")
        super().__init__(previous, following, previous.output().weight.shape[0])


class Refit(MLPMap):
    """`refit` (ours): `h + A V^T + b`, A the inputs of the layer's down projection, which folds to `W + V`.

    ReplaceMe's maps are among these: `V = T W`.
    """

    reads_input = True

    def __init__(self, previous: Neighbour, following: Neighbour) -> None:
        previous.check_down("refit", experts=False)
        super().__init__(previous, following, previous.down().weight.shape[1])

    def place(self, previous: Neighbour) -> nn.Module:
        return previous.down_module()


class Scale(Operator):
    """`scale`: `a h`, one factor for the whole residual stream (Prune&Comp, arXiv 2507.18212).

    A norm's output does not depend on its input's scale (up to its eps), so it folds to `1 / a` on all that the layers
    behind add. The paper multiplies what comes before instead; then the embedding, which may be tied to the LM head,
    would have to change.
    """

    is_stock = True

    def __init__(self, previous: Neighbour, following: Neighbour) -> None:
        super().__init__(make_spec(previous, scale=True))
        self.coefficients = nn.Parameter(previous.output().weight.new_zeros(1, 1))

    def synthesise(self, previous: Neighbour, following: Neighbour) -> Tensors:
        return {"scale": self.coefficients[0].expand(self.spec["hidden_size"])}


class Patch(Operator):
    """`patch`: `h H^T diag(d) H`, d the growth of each channel of the rotated hidden states (LinearPatch, 2505.24680).

    The map takes the residual stream itself, and a stock layer only adds to it: it stays a matrix of its own.
    """

    def __init__(self, previous: Neighbour, following: Neighbour) -> None:
        super().__init__(make_spec(previous, norm="none", linear=True))
        size = self.spec["hidden_size"]
        self.coefficients = nn.Parameter(previous.output().weight.new_zeros(size, size))

    def synthesise(self, previous: Neighbour, following: Neighbour) -> Tensors:
        return {"linear.weight": self.coefficients}


def rotation(size: int, device: Any = None) -> torch.Tensor:
    """An orthogonal matrix that spreads each channel over all (D, D): Hadamard's, in float64.

    Hadamard matrices of Sylvester's kind exist for powers of 2 only. Of another width the odd factor is an orthonormal
    cosine transform.

    Args:
        size: D.
        device: Where it is made.
    """
    power = size & -size
    cosines = fft.dct(np.eye(size // power), axis=0, norm="ortho")
    return torch.from_numpy(np.kron(cosines, linalg.hadamard(power) / math.sqrt(power))).to(device)
