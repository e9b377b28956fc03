"""End-to-end training whose activations are those of one segment of the decoder: the others are computed again.

transformers' checkpointing computes each layer again; this, whole runs of layers. Shapes: B batch, T tokens, D hidden
channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments

from lopt_hf.local.blocks import split_layers
from lopt_hf.local.layer_calls import hidden_of, output_hidden, with_output_hidden
from lopt_hf.local.objectives import LocalBatch
from lopt_hf.local.replay import BlockRun, Replay, Replays
from lopt_hf.local.stacks import DecoderStack, find_decoder_stack
from lopt_hf.peers.base import Peer

__all__ = ["CheckpointSegments"]


class CheckpointSegments(Peer):
    """Checkpoints the decoder by segments (arXiv 1604.06174, Sec. 4), for the same gradients.

    A forward keeps the hidden states before each segment, and the graph of the last one; the backward runs each of the
    others again with a graph, from the last to the first, and frees it. That is one more forward of all segments but
    the last.

    Args:
        num_blocks: Segments that the decoder layers are cut into.
        split_at: First layer of every segment but the first, instead of an even split.
    """

    name = "e2e_segments"
    takes_adapters = True

    def __init__(self, num_blocks: int = 2, split_at: Sequence[int] | None = None) -> None:
        self.num_blocks, self.split_at = num_blocks, split_at
        self._stack: DecoderStack | None = None
        self._handles: list[RemovableHandle] = []
        self._replays: Replays | None = None
        self._is_without_graph = False  # while a segment runs for the first time
        self._is_again = False  # while one runs again

    def check(self, args: TrainingArguments) -> None:
        super().check(args)
        if args.gradient_checkpointing:
            raise ValueError(
                f"activation_checkpointing=True computes every layer again, and {self.name} does so by segments; set "
                "activation_checkpointing to False."
            )

    def prepare(self, model: PreTrainedModel) -> None:
        if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
            raise ValueError(
                f"output_router_logits=True does not work with {self.name}, whose first pass has no gradient for the "
                "routers' loss; set it to False."
            )
        self._stack = find_decoder_stack(model)
        self._segments = split_layers(len(self._stack.layers), self.num_blocks, self.split_at)

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._stack is not None
        layers = self._stack.layers
        self._handles = [self._stack.decoder.register_forward_hook(self._leave_decoder, always_call=True)]
        for segment in self._segments[:-1]:
            enter, leave = partial(self._enter, segment.index), partial(self._leave, segment.index)
            self._handles.append(layers[segment.start].register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(layers[segment.stop - 1].register_forward_hook(leave))
        self._replays = _SegmentReplays(self._stack, self._segments[:-1])  # its hooks come after those above
        self._handles += self._replays.handles

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_again or not layer.training or not torch.is_grad_enabled():
            return
        assert self._replays is not None
        self._replays.begin_forward()
        h_BTD = hidden_of(args, kwargs)
        self._replays.enter(index, h_BTD, h_BTD.detach())
        self._is_without_graph = True
        torch.set_grad_enabled(False)  # until `_leave`

    def _leave(self, index: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._is_without_graph:
            return None
        assert self._replays is not None
        self._is_without_graph = False
        torch.set_grad_enabled(True)
        run = self._replays.forwards[-1][index]
        self._replays.leave(output_hidden(output), [], LocalBatch())
        self._replays.clear()
        if run.autocast["enabled"]:
            torch.clear_autocast_cache()  # the segment's weights in low precision, which nothing needs before then
        # Without an input that has a gradient, as behind frozen embeddings, there would be no backward.
        anchor = torch.empty(0, requires_grad=True)
        run_again = partial(self._run_again, index, run)
        h_BTD: torch.Tensor = _RunAgain.apply(run_again, anchor, run.input_BTD, run.output_BTD)  # type: ignore[no-untyped-call]
        return with_output_hidden(output, h_BTD)

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._is_without_graph:  # a layer has raised
            assert self._replays is not None
            self._is_without_graph = False
            torch.set_grad_enabled(True)
            self._replays.end_forward()

    def _run_again(self, index: int, run: BlockRun, gradient_BTD: torch.Tensor, learns_at_input: bool) -> Replay:
        """Runs a segment again with a graph, and its backward."""
        assert self._replays is not None
        self._is_again = True
        try:
            with torch.enable_grad():
                replay = self._replays.run_again(index, run, learns_at_input)
        finally:
            self._is_again = False
        replay.run_backward(gradient_BTD, run)
        return replay


class _SegmentReplays(Replays):
    """Tells in this module's words what cannot run again."""

    def _record(self, *args: Any) -> None:
        with _in_own_words():
            super()._record(*args)

    def leave(self, *args: Any) -> None:
        with _in_own_words():
            super().leave(*args)


@contextmanager
def _in_own_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"{CheckpointSegments.name} does not work with this model, whose layers get more than the hidden states "
            "of the layer before; use activation_checkpointing."
        ) from error


class _RunAgain(torch.autograd.Function):
    """The identity for what a segment has put out; its backward runs the segment again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, run_again: Any, anchor: torch.Tensor, start_BTD: torch.Tensor, output_BTD: torch.Tensor
    ) -> torch.Tensor:
        ctx.run_again = run_again
        ctx.save_for_backward(start_BTD)  # the run has it too; here it is seen to be saved for the backward
        return output_BTD.detach()

    @staticmethod
    def backward(ctx: Any, gradient_BTD: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        replay: Replay = ctx.run_again(gradient_BTD, ctx.needs_input_grad[2])
        return None, None, replay.input_BTD.grad, None
