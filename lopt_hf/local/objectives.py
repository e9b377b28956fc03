"""Local objectives: what a block learns from where the task gradient does not reach it.

Shapes: B batch, T tokens, D hidden channels. Of a model with N residual streams (hyper-connections) what is called BTD
has the shape (B, T, N, D).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional as F

__all__ = [
    "LocalBatch",
    "LocalObjective",
    "NoObjective",
    "ObjectiveWithHead",
    "ReconstructionHead",
    "ReconstructionObjective",
    "head_of",
]


@dataclass(frozen=True)
class LocalBatch:
    """What a local objective may know of the batch besides the hidden states.

    Attributes:
        mask_BT: 1 for a token, 0 for padding; `None` where nothing is padded (packed, padding-free).
        inputs: The trainer's batch (`input_ids`, `labels`, ...); TRL adds what it passes to the model.
    """

    mask_BT: torch.Tensor | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)


class LocalObjective(Protocol):
    """A loss on one block's output that trains this block alone.

    The task loss still trains the last block. Pass an instance as `LoPTTrainer(..., local_objective=...)`; it is
    called once per early block and micro-batch, in training only. One that trains something beside the block is an
    `ObjectiveWithHead`.

    Example: keep each block close to the identity, without a head.

    ```python
    import torch
    from lopt_hf import LocalBatch


    class StayClose:
        def __call__(self, head, output_BTD, input_BTD, batch: LocalBatch) -> torch.Tensor:
            return (output_BTD.float() - input_BTD.float()).square().mean()
    ```
    """

    def __call__(
        self, head: nn.Module, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: LocalBatch
    ) -> torch.Tensor:
        """Returns the scalar loss of one block.

        Args:
            head: The block's head: what `ObjectiveWithHead.make_head` made, or the method; `torch.nn.Identity()`
                where neither makes one.
            output_BTD: The block's output, with its graph back to the block's parameters, in the model's dtype: cast
                it to the head's (`output_BTD.to(head.weight.dtype)`).
            input_BTD: The block's input, detached.
            batch: Mask and inputs of the micro-batch.
        """


@runtime_checkable
class ObjectiveWithHead(LocalObjective, Protocol):
    """A local objective that trains a module of its own beside each early block."""

    def make_head(self, hidden_size: int) -> nn.Module:
        """Makes the trainable module that one block's loss needs, in fp32; it is dropped from the saved model.

        The random state is seeded before the call, so that runs and ranks agree, and restored after it.

        Args:
            hidden_size: Width D of the hidden states.
        """


def head_of(objective: LocalObjective, hidden_size: int) -> nn.Module:
    """Makes the head of one block.

    Args:
        objective: What the block learns from.
        hidden_size: Width D of the hidden states.

    Returns:
        What the objective makes; a module without parameters where it makes none.
    """
    return objective.make_head(hidden_size) if isinstance(objective, ObjectiveWithHead) else nn.Identity()


class NoObjective:
    """No local objective: early blocks learn from the task loss alone, where it reaches them."""

    def __call__(
        self, head: nn.Module, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: LocalBatch
    ) -> torch.Tensor:
        return output_BTD.new_zeros(())


class ReconstructionHead(nn.Sequential):
    """LoPT's head `g(h) = W2 GELU(W1 LayerNorm(h) + b1) + b2` of shape (B, T, D) -> (B, T, D).

    Xavier-uniform weights at gain 0.1, zero biases (LoPT paper, Sec. 3; its code agrees). Training only.

    Args:
        hidden_size: Width D of the hidden states.
        bottleneck: `W1` maps D to `D // bottleneck` channels.
    """

    def __init__(self, hidden_size: int, bottleneck: int) -> None:
        narrow = max(1, hidden_size // bottleneck)
        down, up = nn.Linear(hidden_size, narrow), nn.Linear(narrow, hidden_size)
        for linear in (down, up):
            nn.init.xavier_uniform_(linear.weight, gain=0.1)
            nn.init.zeros_(linear.bias)
        super().__init__(nn.LayerNorm(hidden_size), down, nn.GELU(), up)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the head's weights."""
        return next(self.parameters()).dtype

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        return super().forward(h_BTD.to(self.dtype))


class ReconstructionObjective:
    """Mean squared error, over tokens and channels in fp32, of reconstructing a block's input from its output.

    LoPT paper, Sec. 3: `L_aux = mean (g(h_out) - sg(h_in))^2`.

    Of a model with hyper-connections, whose layers hand on several residual streams (B, T, N, D), the one head maps
    each stream to the same stream of the input, and the mean is over all of them. What the layers read and write is
    the streams; their sum or mean would leave out what a block moves from one to another (ours: the paper has none).

    Args:
        bottleneck: Divisor of the head's inner width (paper: d -> d/4 -> d).
        masked: Leave padding out of the mean (paper, App. L); `False` averages over it too, as the code does.
    """

    def __init__(self, bottleneck: int = 4, masked: bool = True) -> None:
        self.bottleneck = bottleneck
        self.masked = masked

    def make_head(self, hidden_size: int) -> nn.Module:
        """Makes a bottleneck MLP."""
        return ReconstructionHead(hidden_size, self.bottleneck)

    def __call__(
        self, head: nn.Module, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: LocalBatch
    ) -> torch.Tensor:
        reconstruction_BTD = head(output_BTD).float()
        if not self.masked or batch.mask_BT is None:
            return F.mse_loss(reconstruction_BTD, input_BTD.float())
        error_BT = (reconstruction_BTD - input_BTD.float()).square().flatten(2).mean(dim=-1)
        mask_BT = batch.mask_BT.to(error_BT.dtype)
        return (error_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)
