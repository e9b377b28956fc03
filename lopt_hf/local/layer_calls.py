"""With which arguments a decoder calls its layers, so that a copy of a deeper layer can run before the layer itself.

Shapes: B batch, T tokens, D hidden channels.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from lopt_hf.common.upstream.transformers import active_collector as _active_collector
from lopt_hf.local.blocks import DecoderStack

__all__ = ["LayerCall", "record_layer_calls"]

# A copy keeps no keys and values of its own, and must not write into the model's.
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class _StopForwardError(Exception):
    """Ends a forward once the last layer's arguments are known."""


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

    def __call__(self, layer: nn.Module, h_BTD: torch.Tensor) -> torch.Tensor:
        """The layer's output for other hidden states than those it was called with."""
        if self.hidden_is_named:
            output = layer(*self.args, hidden_states=h_BTD, **self.kwargs)
        else:
            output = layer(h_BTD, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output  # Falcon's also return attention weights


@torch.no_grad()
def record_layer_calls(stack: DecoderStack, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, LayerCall]:
    """Runs the decoder's own forward with layers that only write down how they are called.

    What a layer is given depends on the architecture and on the layer (sliding windows, local and global rotary
    embeddings), and only the decoder knows it. The random state is left as it was.

    Args:
        stack: The decoder.
        args: Positional arguments of its forward.
        kwargs: Named arguments of its forward.

    Returns:
        For each layer how it is called.
    """
    calls: dict[int, LayerCall] = {}
    token = _active_collector.set(None)  # nothing that happens here is an output of the model
    devices = {p.device for p in stack.decoder.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]), _recording(stack.layers, calls):
            stack.decoder.forward(*args, **kwargs)
    except _StopForwardError:
        pass
    finally:
        _active_collector.reset(token)
    return calls


@contextmanager
def _recording(layers: nn.ModuleList, calls: dict[int, LayerCall]) -> Iterator[None]:
    bound = {index: vars(layer).get("forward") for index, layer in enumerate(layers)}
    hooks = [(layer._forward_pre_hooks, layer._forward_hooks) for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer._forward_pre_hooks, layer._forward_hooks = OrderedDict(), OrderedDict()  # it is no forward of theirs
            layer.forward = _Recorder(calls, index, is_last=index == len(layers) - 1)  # type: ignore[assignment]
        yield
    finally:
        for index, layer in enumerate(layers):
            layer._forward_pre_hooks, layer._forward_hooks = hooks[index]
            del layer.forward
            if bound[index] is not None:
                layer.forward = bound[index]  # type: ignore[assignment]


class _Recorder:
    """In place of a layer's forward."""

    def __init__(self, calls: dict[int, LayerCall], index: int, is_last: bool) -> None:
        self.calls, self.index, self.is_last = calls, index, is_last

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden_is_named = "hidden_states" in kwargs
        rest = args if hidden_is_named else args[1:]
        named = {name: None if name in _CACHES else value for name, value in kwargs.items() if name != "hidden_states"}
        named |= {"use_cache": False} if "use_cache" in named else {}
        rest = tuple(None if isinstance(value, Cache) else value for value in rest)
        self.calls[self.index] = LayerCall(rest, named, hidden_is_named)
        if self.is_last:
            raise _StopForwardError
        hidden_BTD: torch.Tensor = kwargs["hidden_states"] if hidden_is_named else args[0]
        # Some decoders take the first element of what a layer returns, which a first axis of length one allows.
        return hidden_BTD.reshape(1, *hidden_BTD.shape[-3:])
