"""RepL's operator for convolutional networks: a residual block's place is taken by one convolution.

Shapes: B batch, C channels of a feature map, H height, W width, and kernels (C, C, k, k) as w_OIkk.
"""

from typing import Any

import torch
from torch import nn

from lopt_hf.repl.neighbours import Affine, effective
from lopt_hf.repl.operator_base import Operator, Tensors, mean, tensors_of

__all__ = ["ConvNeighbour", "Convolution"]


class ConvNeighbour:
    """One of the two residual blocks beside a removed one, of a ResNet. Reads; owns nothing.

    Args:
        layer: The block.
        config: The model's config.
        detach: Read the weights as constants.
    """

    def __init__(self, layer: Any, config: Any, detach: bool = True) -> None:
        self.layer = layer
        self.layer_type: str = config.layer_type
        self.activation: str = config.hidden_act
        self.detach = detach

    def kernel(self) -> Affine:
        """Returns the block's last convolution, whose output is added to the residual stream, w_OIkk and b_O.

        It is what the output projection is to an attention. Its batch norm is left out: normalised kernels do not
        depend on its scale.
        """
        kernel = effective(self.layer.layer[-1].convolution)
        if not self.detach:
            return kernel
        return Affine(kernel.weight.detach(), None if kernel.bias is None else kernel.bias.detach())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what is read: neighbours must share them."""
        return {"the last convolution": tuple(self.kernel().weight.shape)}


class Convolution(Operator):
    """`conv` (paper): `act(X + K * X)`, K of the neighbours' normalised kernels, alpha and beta for each channel.

    `K[o] = alpha[o] A[o] / |A[o]| + beta[o] B[o] / |B[o]|` for each output channel o, A and B the kernels of the
    blocks before and behind. The paper has no code. That a kernel is normalised to unit length for each output
    channel, as the rows of `head` are, that it is a block's last one, and that the block's activation stays behind the
    sum, is our reading.

    Args:
        previous: The block before, a `ConvNeighbour`.
        following: The block behind.

    Raises:
        ValueError: If the kernels have not as many input as output channels.
    """

    def __init__(self, previous: Any, following: Any) -> None:
        kernel = previous.kernel()
        out_channels, in_channels, size, _ = kernel.weight.shape
        if in_channels != out_channels:
            raise ValueError(
                f"operator='conv' applies a block's last convolution to feature maps, but that of layer_type="
                f"{previous.layer_type!r} takes {in_channels} channels and makes {out_channels}; use a ResNet with "
                "layer_type='basic' (as ResNet-34)."
            )
        super().__init__(
            {
                "channels": out_channels,
                "kernel_size": size,
                "bias": kernel.bias is not None,
                "activation": previous.activation,
            }
        )
        self.coefficients = nn.Parameter(kernel.weight.new_zeros(2, out_channels))

    def synthesise(self, previous: Any, following: Any) -> Tensors:
        a, b = previous.kernel(), following.kernel()
        alpha_O, beta_O = self.coefficients
        kernel = Affine(_of_length(a.weight, alpha_O) + _of_length(b.weight, beta_O), mean(a.bias, b.bias))
        return tensors_of("convolution", kernel)


def _of_length(weight_OIkk: torch.Tensor, length_O: torch.Tensor) -> torch.Tensor:
    """A kernel whose entries have for each output channel the length that is given as their norm."""
    unit_OIkk = nn.functional.normalize(weight_OIkk.flatten(1), dim=1).view_as(weight_OIkk)
    return length_O[:, None, None, None] * unit_OIkk
