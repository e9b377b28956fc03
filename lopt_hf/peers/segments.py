"""End-to-end training whose activations are those of one segment of the decoder: the others are computed again.

transformers' checkpointing computes each layer again; this, whole runs of layers. Shapes: B batch, T tokens, D hidden
channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments
from transformers.cache_utils import Cache

from lopt_hf.common.upstream.torch import tree_iter
from lopt_hf.local.blocks import Block, DecoderStack, find_decoder_stack, split_layers
from lopt_hf.local.layer_calls import LayerCall, hidden_of, output_hidden, with_output_hidden
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
        self._pass: _Pass | None = None  # through the segment that runs, if it runs without a graph
        self._is_again = False  # while a segment runs a second time

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
            for index in range(segment.start, segment.stop):
                enter = partial(self._enter_layer, segment, index)
                self._handles.append(layers[index].register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(layers[segment.stop - 1].register_forward_hook(self._leave_segment))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter_layer(
        self, segment: Block, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._is_again:
            return
        if index == segment.start and layer.training and torch.is_grad_enabled():
            self._pass = _Pass(self, segment, hidden_of(args, kwargs))
            torch.set_grad_enabled(False)  # `_leave_segment` enables it again
        if self._pass is not None:
            self._pass.calls.append(self._call_of(args, kwargs))

    def _call_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall:
        named = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        is_named = named.pop("hidden_states", None) is not None
        rest = tuple(None if isinstance(value, Cache) else value for value in (args if is_named else args[1:]))
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in tree_iter((rest, named))):
            raise ValueError(
                f"{self.name} does not work with this model, whose layers get tensors with a gradient besides the "
                "hidden states; use activation_checkpointing."
            )
        return LayerCall(rest, named, is_named)

    def _leave_segment(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._is_again or self._pass is None:
            return None
        finished, self._pass = self._pass, None
        torch.set_grad_enabled(True)
        return with_output_hidden(output, finished.output(output_hidden(output)))

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._pass is not None:  # a layer has raised
            self._pass = None
            torch.set_grad_enabled(True)

    def run_again(self, segment: Block, calls: Sequence[LayerCall], h_BTD: torch.Tensor) -> torch.Tensor:
        """Runs a segment by the calls of its layers in the first pass."""
        assert self._stack is not None
        self._is_again = True
        try:
            for layer, call in zip(self._stack.layers[segment.start : segment.stop], calls, strict=True):
                h_BTD = call(layer, h_BTD)
        finally:
            self._is_again = False
        return h_BTD


class _Pass:
    """A segment's run without a graph, and what is needed to run it again.

    Args:
        checkpoint: What runs it.
        segment: The segment.
        h_BTD: The hidden states that it starts from.
    """

    def __init__(self, checkpoint: CheckpointSegments, segment: Block, h_BTD: torch.Tensor) -> None:
        self.calls: list[LayerCall] = []
        self._checkpoint, self._segment, self._h_BTD = checkpoint, segment, h_BTD
        self._random_state = torch.get_rng_state()
        self._device_states = get_device_states(h_BTD)
        self._device_type = h_BTD.device.type
        self._autocast: dict[str, Any] = {
            "dtype": torch.get_autocast_dtype(self._device_type),
            "enabled": torch.is_autocast_enabled(self._device_type),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

    def output(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """Returns what the segment has put out, as the outcome of a function whose backward runs the segment again."""
        if self._autocast["enabled"]:
            torch.clear_autocast_cache()  # the segment's weights in low precision, which nothing needs before then
        # Without an input that has a gradient, as behind frozen embeddings, there would be no backward.
        anchor = torch.empty(0, requires_grad=True)
        output_BTD: torch.Tensor = _RunAgain.apply(self, anchor, self._h_BTD, h_BTD)  # type: ignore[no-untyped-call]
        return output_BTD

    def again(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """Runs the segment again, with a graph."""
        with self._state_of_then(), torch.enable_grad(), torch.autocast(self._device_type, **self._autocast):
            return self._checkpoint.run_again(self._segment, self.calls, h_BTD)

    @contextmanager
    def _state_of_then(self) -> Iterator[None]:
        devices, states = self._device_states
        device_type = self._device_type if devices else "cuda"
        with torch.random.fork_rng(devices=devices, device_type=device_type):
            torch.set_rng_state(self._random_state)
            set_device_states(devices, states, device_type=device_type)
            yield


class _RunAgain(torch.autograd.Function):
    """The identity for what a segment has put out; its backward runs the segment again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, through: _Pass, anchor: torch.Tensor, start_BTD: torch.Tensor, output_BTD: torch.Tensor
    ) -> torch.Tensor:
        ctx.through = through
        ctx.save_for_backward(start_BTD)
        return output_BTD.detach()

    @staticmethod
    def backward(ctx: Any, gradient_BTD: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (start_BTD,) = ctx.saved_tensors
        again_BTD = start_BTD.detach().requires_grad_(ctx.needs_input_grad[2])
        output_BTD = ctx.through.again(again_BTD)
        if output_BTD.requires_grad:  # not so where adapters are on later layers only
            torch.autograd.backward(output_BTD, gradient_BTD)
        return None, None, again_BTD.grad, None
