"""Windows of blocks inside which gradients flow, with one forward per block: the model's own.

Every block is a graph segment of its own, from a detached input to its output. The gradient of a window's loss at its
last block's output (its cotangent) travels back through the window segment by segment; none is computed twice.

Shapes: B batch, T tokens, D hidden channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.blocks import Block
from lopt_hf.local.hooks import BlockBoundary, Way, cut
from lopt_hf.local.layer_calls import LayerCall, record_layer_calls
from lopt_hf.local.micro_batch import MicroBatch
from lopt_hf.local.objectives import LocalObjective

__all__ = ["LossWeights", "WindowBoundary"]


@dataclass(frozen=True)
class LossWeights:
    """Weights of a block's independent loss, on its own output, and of its cascaded one, behind its auxiliary."""

    independent: float
    cascaded: float


@dataclass
class _Segment:
    """One block's part of the graph, which lives until the last window that contains the block is done."""

    index: int
    input_BTD: torch.Tensor | None  # None for the first block, before which nothing learns
    output_BTD: torch.Tensor
    balance: torch.Tensor | None  # load-balancing loss of the block's routers
    cotangent_BTD: torch.Tensor | None = None  # of all losses so far, at the output

    def add(self, cotangent_BTD: torch.Tensor) -> None:
        self.cotangent_BTD = cotangent_BTD if self.cotangent_BTD is None else self.cotangent_BTD + cotangent_BTD

    def hand_back(self, cotangent_BTD: torch.Tensor) -> torch.Tensor:
        """The cotangent at the segment's input. The weights' gradients wait until all cotangents are summed."""
        assert self.input_BTD is not None
        return torch.autograd.grad(self.output_BTD, self.input_BTD, cotangent_BTD, retain_graph=True)[0]


class WindowBoundary(BlockBoundary):
    """Lets each loss train a window of adjacent blocks, and no others.

    On the output of an early block stand two losses of the same objective: the independent one, whose gradient stays
    in the block, and the cascaded one behind the block's auxiliary, whose gradient reaches the `window` blocks that
    end there (all that there are, near the start). The task loss is the cascaded loss of the last window: `finish`,
    after its backward, hands its gradient back through the early blocks of that window.

    A block's graph is freed when the last window that contains it is done, so at most `window` of them live at a time.
    Where the task's gradient is to reach further than a window (`MicroBatch.reach`), its window is as much larger.

    A model may be here in part, with some of its blocks: windows that would begin before them begin with the first one
    that is here, as they do near the start of the model.

    Attributes:
        trains_blocks: Whether the local losses train the blocks, or their auxiliaries only.
        window_losses: Of the last micro-batch, by name: `block_0/cascaded` and so on.

    Args:
        model: A `transformers` causal language model (of a `PeftModel`, its base model).
        blocks: The cut of its decoder layers.
        objective: The loss of hidden states, as a `LocalObjective`; the auxiliaries stand before it.
        auxiliaries: For each block with losses of its own (its index, as text) what it learns through: a module that
            is called with hidden states and the calls of the decoder's layers.
        window: Number of adjacent blocks that a loss reaches, k of the paper.
        weights: Weights of the two losses.
        task_share: Factor of the task's gradient behind the last block: its head serves both losses, so the
            independent share of the gradient stays in it.
        router_coefficient: Weight of the load-balancing loss, which stays in each block; 0 without routers.
        stage_starts: First blocks of stages of a pipeline; no window crosses from one stage into the next.
        early_blocks: The early blocks that run in this process. Default: all but the last.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        objective: LocalObjective,
        auxiliaries: nn.ModuleDict,
        window: int,
        weights: LossWeights,
        task_share: float,
        router_coefficient: float = 0.0,
        stage_starts: Sequence[int] = (),
        early_blocks: Sequence[Block] | None = None,
    ) -> None:
        super().__init__(model, blocks, objective, auxiliaries, router_coefficient, early_blocks)
        self.window = window
        # For each block the first one of the window that ends there, and the last one whose window contains it.
        starts = [0, *stage_starts]
        self._begins = [
            max(end - window + 1, *(start for start in starts if start <= end)) for end in range(len(blocks))
        ]
        self._ends = [
            max(end for end, begin in enumerate(self._begins) if begin <= index <= end) for index in range(len(blocks))
        ]
        self._task_begins = self._begins[-1]  # of the micro-batch: the first block of the task's window
        self.weights = weights
        self.task_share = task_share
        self.trains_blocks = True
        self.window_losses: dict[str, list[torch.Tensor]] = {}
        self._segments: dict[int, _Segment] = {}
        self._boundary_BTD: torch.Tensor | None = None  # where the next block starts
        self._calls: Mapping[int, LayerCall] = {}

    def way(self, index: int) -> Way:
        """Returns how an early block is to run: with a graph of its own, which its windows hand gradients through."""
        return "local" if self.micro_batch.trains_early_blocks else "blind"

    def begin(self) -> None:
        self._task_begins = min(self._begins[-1], len(self.blocks) - self.micro_batch.reach)

    def named_losses(self) -> dict[str, list[torch.Tensor]]:
        return self.window_losses

    def check_task_loss(self, loss: torch.Tensor, reach: int = 1) -> None:
        """As the parent's; in a window over all blocks there is nothing that the task loss must not reach."""
        if self.window < len(self.blocks):
            super().check_task_loss(loss, reach)

    def finish(self, micro_batch: MicroBatch) -> None:
        """Hands the task's gradient back through its window. To be called after the task loss's backward.

        Args:
            micro_batch: The one that `training_forward` was given.
        """
        if self._boundary_BTD is None:
            return
        last, cotangent_BTD = len(self.blocks) - 1, self._boundary_BTD.grad
        if cotangent_BTD is not None:
            self._reach_back(last - 1, self._task_begins, cotangent_BTD * self.task_share, micro_batch)
        self._close(list(self._segments), micro_batch)
        self.abandon()

    def abandon(self) -> None:
        self._segments = {}
        self._boundary_BTD = None

    def enter_decoder(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._segments:
            raise RuntimeError(
                "A micro-batch began before the last one was finished; call `finish` after its backward."
            )
        self._boundary_BTD = None
        self.window_losses = {}
        if len(self.heads):
            self._calls = self.record_calls(args, kwargs)

    def record_calls(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[int, LayerCall]:
        """Returns how the decoder calls its layers in a forward with these arguments; auxiliaries are called so."""
        return record_layer_calls(self.stack, args, kwargs)

    def leave_decoder(self) -> None:
        self._calls = {}

    def enter_block(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if not hidden_BTD.requires_grad and self.model.is_activation_checkpointing:
            return cut(hidden_BTD)  # reentrant checkpointing gives no gradient unless an input requires one
        return hidden_BTD

    def leave_block(self, index: int, output_BTD: torch.Tensor) -> torch.Tensor:
        segment = _Segment(index, self._boundary_BTD, output_BTD, self.routers.own_loss(self._mask_BT))
        self._segments[index] = segment
        if self.window < len(self.blocks):
            self.check_reach(index, output_BTD)
        if str(index) in self.heads:
            self._learn(segment)
        self._boundary_BTD = cut(output_BTD)
        return self._boundary_BTD

    def _learn(self, segment: _Segment) -> None:
        """Runs the losses that stand on a block's output, and what of the graph they complete."""
        own_BTD, handed_BTD = cut(segment.output_BTD), cut(segment.output_BTD)
        loss = self._losses(segment.index, own_BTD, handed_BTD) * self.micro_batch.scale
        with self.outside_the_forward(handed_BTD.device.type):
            self.micro_batch.events.run_backward(segment.index, loss)
            del loss
            assert handed_BTD.grad is not None
            if self.trains_blocks:
                self._reach_back(segment.index, self._begins[segment.index], handed_BTD.grad)
            if self.trains_blocks and own_BTD.grad is not None:
                segment.add(own_BTD.grad)
            done = [i for i in self._segments if self._ends[i] == segment.index and i < self._task_begins]
            self._close(done, self.micro_batch)

    def _losses(self, index: int, own_BTD: torch.Tensor, handed_BTD: torch.Tensor) -> torch.Tensor:
        """The weighted sum of a block's two losses."""
        batch = self.local_batch(own_BTD)
        auxiliary = self.heads[str(index)]
        cascaded = self.objective(auxiliary, auxiliary(handed_BTD, self._calls), handed_BTD, batch)
        self.window_losses[f"block_{index}/cascaded"] = [cascaded.detach()]
        if not self.weights.independent:
            return self.weights.cascaded * cascaded
        independent = self.objective(auxiliary, own_BTD, own_BTD, batch)
        self.window_losses[f"block_{index}/independent"] = [independent.detach()]
        return self.weights.cascaded * cascaded + self.weights.independent * independent

    def _reach_back(
        self, newest: int, oldest: int, cotangent_BTD: torch.Tensor, task: MicroBatch | None = None
    ) -> None:
        """Takes a cotangent through a window, from block `newest` to block `oldest`.

        Args:
            newest: Index of the block at whose output it is.
            oldest: Index of the window's first block.
            cotangent_BTD: The cotangent.
            task: The micro-batch, if the cotangent is the task's, which it scales.
        """
        for index in range(newest, oldest - 1, -1):
            if task is not None and (factor := task.factor_across(index)) != 1.0:
                cotangent_BTD = cotangent_BTD * factor
            self._segments[index].add(cotangent_BTD)
            if index > oldest:
                cotangent_BTD = self._segments[index].hand_back(cotangent_BTD)

    def _close(self, indices: Sequence[int], micro_batch: MicroBatch) -> None:
        """Runs the backward of blocks that all their windows have reached, and frees their graphs."""
        for index in indices:
            segment = self._segments.pop(index)
            balance = segment.balance if self.trains_blocks else None
            if segment.cotangent_BTD is not None:
                torch.autograd.backward(segment.output_BTD, segment.cotangent_BTD, retain_graph=balance is not None)
            if balance is not None:
                micro_batch.events.run_backward(index, balance * micro_batch.scale)
            micro_batch.events.on_block_done(index)
