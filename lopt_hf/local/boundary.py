"""The gradient boundary: a block's gradient stays inside the block, which learns from a local objective.

Shapes: B batch, T tokens, D hidden channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.blocks import Block
from lopt_hf.local.hooks import BlockBoundary, cut
from lopt_hf.local.layer_calls import hidden_without_noise
from lopt_hf.local.objectives import LocalBatch, LocalObjective
from lopt_hf.local.replay import BlockRun

__all__ = ["GradientBoundary"]


class GradientBoundary(BlockBoundary):
    """Keeps the gradient of each block of a decoder inside that block.

    In a training forward it
    1. captures each early block's input at its first layer,
    2. computes the block's local loss on its last layer's output,
    3. runs that loss's backward at once (`mode="eager"`), which frees the block's activations before the next block
       starts, or keeps it for `joint_loss()` (`mode="joint"`),
    4. hands the detached output to the next block.

    Args:
        model: A `transformers` causal language model (of a `PeftModel`, its base model).
        blocks: The cut of its decoder layers, from `split_layers`.
        objective: The local objective of the early blocks.
        heads: The heads of the early blocks that run in this process.
        weight: Factor of the sum of the local losses over the early blocks. Their mean is weighted by LoPT's
            lambda: pass `lambda / (num_blocks - 1)`.
        mode: When the local backward runs; see above.
        router_coefficient: Weight of the load-balancing loss; 0 where the model has no routers.
        early_blocks: The early blocks that run in this process. Default: all but the last.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        objective: LocalObjective,
        heads: nn.ModuleDict,
        weight: float,
        mode: Literal["eager", "joint"],
        router_coefficient: float = 0.0,
        early_blocks: Sequence[Block] | None = None,
    ) -> None:
        super().__init__(model, blocks, objective, heads, router_coefficient, early_blocks)
        self.weight = weight
        self.mode = mode
        self.losses: dict[int, list[torch.Tensor]] = {}
        self._joint_losses: list[torch.Tensor] = []
        self._input_BTD: torch.Tensor | None = None
        self._without_noise_BTD: torch.Tensor | None = None

    def begin(self) -> None:
        self.losses = {block.index: [] for block in self.early_blocks}
        self._joint_losses = []

    def named_losses(self) -> dict[str, list[torch.Tensor]]:
        return {f"block_{index}": losses for index, losses in self.losses.items() if losses}

    def joint_loss(self) -> torch.Tensor | None:
        """Returns the weighted sum of the last micro-batch's local losses, to add to the task loss (`"joint"`)."""
        return torch.stack(self._joint_losses).sum() if self._joint_losses else None

    def enter_decoder(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._without_noise_BTD = None
        if self.micro_batch.trains_early_blocks and self.early_blocks and self.early_blocks[0].index == 0:
            self._without_noise_BTD = hidden_without_noise(self.stack, args, kwargs)

    def leave_decoder(self) -> None:
        self._input_BTD = self._without_noise_BTD = None

    def local_target(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        # Of the first block that is entered: NEFTune's noise is none of what its output is to keep.
        target_BTD, self._without_noise_BTD = self._without_noise_BTD, None
        return hidden_BTD.detach() if target_BTD is None else target_BTD

    def enter_block(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if not hidden_BTD.requires_grad and self.model.is_activation_checkpointing:
            # Reentrant checkpointing gives no gradient at all unless an input of the checkpointed layer requires one,
            # and frozen embeddings do not.
            hidden_BTD = cut(hidden_BTD)
        self._input_BTD = self.local_target(hidden_BTD)
        return hidden_BTD

    def leave_block(self, index: int, output_BTD: torch.Tensor) -> torch.Tensor:
        assert self._input_BTD is not None
        loss = self._local_loss(index, output_BTD, self._input_BTD, self.local_batch(output_BTD))
        balance = self.routers.own_loss(self._mask_BT)
        loss = loss if balance is None else loss + balance
        self.check_reach(index, loss)
        if self.mode == "joint":
            self._joint_losses.append(loss)
            return cut(output_BTD)
        events = self.micro_batch.events
        with self.outside_the_forward(loss.device.type):
            events.run_backward(index, loss * self.micro_batch.scale)
            events.on_block_done(index)
        return cut(output_BTD)

    def local_loss_again(self, index: int, output_BTD: torch.Tensor, run: BlockRun) -> torch.Tensor | None:
        return self._local_loss(index, output_BTD, run.target_BTD, run.batch)

    def _local_loss(
        self, index: int, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: LocalBatch
    ) -> torch.Tensor:
        input_BTD = input_BTD.to(output_BTD.device)  # a block's layers may be spread over devices
        loss = self.objective(self.heads[str(index)], output_BTD, input_BTD, batch)
        self.losses[index].append(loss.detach())
        return loss * self.weight
