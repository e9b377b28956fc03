"""How a stock decoder calls its layers: where hidden states stand in a call, and recording the calls of a forward.

Decoders pass hidden states by position or as `hidden_states=`, and some layers (Falcon's, OpenAI-GPT's) return a tuple
or a list that starts with them. What a layer is given besides depends on the architecture and on the layer (sliding
windows, local and global rotary embeddings), and only the decoder knows it.

Shapes: B batch, T tokens, D hidden channels.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from lopt_hf.common.random_state import RandomState
from lopt_hf.common.upstream.torch import without_forward_hooks
from lopt_hf.common.upstream.transformers import active_collector
from lopt_hf.local.stacks import DecoderStack

__all__ = [
    "LayerCall",
    "evaluating",
    "hidden_of",
    "hidden_without_noise",
    "layer_inputs",
    "output_hidden",
    "record_layer_calls",
    "stop_at",
    "stop_behind",
    "unnoticed",
    "with_hidden",
    "with_output_hidden",
]

# What a decoder adds to hidden states between layers (Qwen3-VL), on which no layer's call depends.
_BETWEEN_LAYERS = ("deepstack_visual_embeds",)

# A copy keeps no keys and values of its own, and must not write into the model's.
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a layer, as a forward pre-hook gets and returns them


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Returns the hidden states (B, T, D) that a layer is called with."""
    hidden_BTD: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_BTD


def with_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden_BTD: torch.Tensor) -> Call:
    """Returns the arguments of a layer's call with other hidden states."""
    return ((hidden_BTD, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, "hidden_states": hidden_BTD})


def output_hidden(output: Any) -> torch.Tensor:
    """Returns the hidden states (B, T, D) in what a layer returned."""
    hidden_BTD: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden_BTD


def with_output_hidden(output: Any, hidden_BTD: torch.Tensor) -> Any:
    """Returns a layer's output with other hidden states in it."""
    return (hidden_BTD, *output[1:]) if isinstance(output, tuple | list) else hidden_BTD


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode for a while; afterwards every module trains as it did."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unnoticed(decoder: nn.Module) -> Iterator[None]:
    """Makes a context in which a decoder runs beside the model's forward, which does not notice.

    Nothing is an output of the model's that is computed here, and the random state is left as it was.

    Args:
        decoder: The decoder.
    """
    random_state = RandomState.of({parameter.device for parameter in decoder.parameters()})
    token = active_collector.set(None)
    try:
        with random_state.restored():
            yield
    finally:
        active_collector.reset(token)


@contextmanager
def layer_inputs(layers: nn.ModuleList, indices: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Keeps the hidden states that layers are given in the latest forward that runs in this block.

    Args:
        layers: The decoder's layers.
        indices: Those of the layers to watch; `len(layers)` stands for the output of the last.

    Yields:
        A dictionary that gets the hidden states, (B, T, D) each, by index.
    """
    seen: dict[int, torch.Tensor] = {}

    def before(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[index] = hidden_of(args, kwargs)

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[len(layers)] = output_hidden(output)

    with ExitStack() as hooks:
        for index in indices:
            if index == len(layers):
                hooks.enter_context(layers[-1].register_forward_hook(behind))
            else:
                hooks.enter_context(layers[index].register_forward_pre_hook(partial(before, index), with_kwargs=True))
        yield seen


class _StopForwardError(Exception):
    """Ends a forward from inside a layer."""


@contextmanager
def stop_at(layer: nn.Module) -> Iterator[list[Call]]:
    """Ends the forwards that run in this block where they reach a layer, before it runs.

    Args:
        layer: The layer that is not to run.

    Yields:
        A list that gets the arguments of the call that was stopped.
    """
    calls: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _StopForwardError

    with _until_stopped(layer.register_forward_pre_hook(stop, with_kwargs=True)):
        yield calls


@contextmanager
def stop_behind(layer: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Ends the forwards that run in this block when a layer has run.

    Args:
        layer: The last layer to run.

    Yields:
        A list that gets the hidden states before and behind the layer, (B, T, D) each.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((hidden_of(args, kwargs), output_hidden(output)))
        raise _StopForwardError

    with _until_stopped(layer.register_forward_hook(stop, with_kwargs=True)):
        yield seen


@contextmanager
def _until_stopped(handle: RemovableHandle) -> Iterator[None]:
    with handle, suppress(_StopForwardError):
        yield


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer besides its hidden states: masks, rotary embeddings, positions.

    Attributes:
        args: The positional ones after the hidden states.
        kwargs: The named ones.
        hidden_is_named: Whether the hidden states are passed as `hidden_states=`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_is_named: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "LayerCall":
        """Makes it of the arguments that a layer is called with, caches left out."""
        hidden_is_named = "hidden_states" in kwargs
        rest = args if hidden_is_named else args[1:]
        named = {name: None if name in _CACHES else value for name, value in kwargs.items() if name != "hidden_states"}
        named |= {"use_cache": False} if "use_cache" in named else {}
        rest = tuple(None if isinstance(value, Cache) else value for value in rest)
        return cls(rest, named, hidden_is_named)

    def __call__(self, layer: nn.Module, h_BTD: torch.Tensor) -> torch.Tensor:
        """The layer's output for other hidden states than those it was called with."""
        if self.hidden_is_named:
            return output_hidden(layer(*self.args, hidden_states=h_BTD, **self.kwargs))
        return output_hidden(layer(h_BTD, *self.args, **self.kwargs))


@torch.no_grad()
def record_layer_calls(stack: DecoderStack, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, LayerCall]:
    """Runs the decoder's own forward with layers that only write down how they are called.

    A copy of a deeper layer can run by such a call before the layer itself. The random state is left as it was.

    Args:
        stack: The decoder.
        args: Positional arguments of its forward.
        kwargs: Named arguments of its forward.

    Returns:
        For each layer how it is called.
    """
    calls: dict[int, LayerCall] = {}
    with unnoticed(stack.decoder), _recording(stack.layers, calls), suppress(_StopForwardError):
        stack.decoder.forward(*args, **{k: v for k, v in kwargs.items() if k not in _BETWEEN_LAYERS})
    return calls


@torch.no_grad()
def hidden_without_noise(stack: DecoderStack, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns the first layer's input as it is without NEFTune's noise; the random state is left as it was.

    Args:
        stack: The decoder.
        args: Positional arguments of its forward.
        kwargs: Named arguments of its forward.

    Returns:
        The hidden states (B, T, D); `None` where there is no noise.
    """
    noisy = [m for m in stack.decoder.modules() if "neftune_noise_alpha" in vars(m) and m.training]
    if not noisy:
        return None
    first = stack.layers[0]
    for module in noisy:
        module.training = False  # which switches the noise off, and of an embedding nothing else
    try:
        with unnoticed(stack.decoder), without_forward_hooks(first), stop_at(first) as calls:
            stack.decoder.forward(*args, **kwargs)
    finally:
        for module in noisy:
            module.training = True
    return hidden_of(*calls[0])


@contextmanager
def _recording(layers: nn.ModuleList, calls: dict[int, LayerCall]) -> Iterator[None]:
    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            undo.enter_context(without_forward_hooks(layer))  # it is no forward of theirs
            recorder = _Recorder(calls, index, is_last=index == len(layers) - 1)
            undo.enter_context(_replaced_forward(layer, recorder))
        yield


@contextmanager
def _replaced_forward(layer: nn.Module, forward: "_Recorder") -> Iterator[None]:
    bound = vars(layer).get("forward")
    layer.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        del layer.forward
        if bound is not None:
            layer.forward = bound


class _Recorder:
    """In place of a layer's forward."""

    def __init__(self, calls: dict[int, LayerCall], index: int, is_last: bool) -> None:
        self.calls, self.index, self.is_last = calls, index, is_last

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = LayerCall.of(args, kwargs)
        self.calls[self.index] = call
        if self.is_last:
            raise _StopForwardError
        hidden_BTD = hidden_of(() if call.hidden_is_named else args, kwargs)
        # Some decoders take the first element of what a layer returns, which a first axis of length one allows.
        return hidden_BTD.reshape(1, *hidden_BTD.shape[-3:])
