"""How an image classifier calls its layers: some are told the size of the image beside the hidden states (Swin, BEiT).

Shapes: B batch, C channels, H height, W width.
"""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from lopt_hf.common.upstream.torch import without_forward_hooks
from lopt_hf.local.layer_calls import LayerCall, evaluating, unnoticed
from lopt_hf.local.stacks import DecoderStack, example_image

__all__ = ["ImageCalls"]

_PLAIN = LayerCall((), {}, hidden_is_named=False)


class ImageCalls:
    """Tells how a model calls its layers for images of a size.

    Args:
        model: An image classifier.
        stack: Its layers.

    Attributes:
        is_plain: Whether layers are called with hidden states alone, as in ViT and ResNet.
        depends_on_size: Whether what they are told besides is no more than numbers, which follow from the image's
            size; else there are tensors among it, such as position biases that train.
    """

    def __init__(self, model: PreTrainedModel, stack: DecoderStack) -> None:
        self._model, self._stack = model, stack
        self._by_size: dict[tuple[Any, ...], dict[int, LayerCall]] = {}
        pixels_BCHW = example_image(model.config, next(model.parameters()).device).to(model.dtype)
        calls = self._record(pixels_BCHW, {})
        values = [value for call in calls.values() for value in (*call.args, *call.kwargs.values())]
        self.is_plain = all(value is None or isinstance(value, bool) for value in values)
        self.depends_on_size = all(_is_of_numbers(value) for value in values)

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[int, LayerCall]:
        """Returns each layer's call in a forward with these arguments.

        For images of a size that it has not seen it runs the first one through the model, in evaluation and without a
        graph.

        Args:
            args: Positional arguments of the forward.
            kwargs: Named arguments of the forward.
        """
        if self.is_plain:
            return defaultdict(lambda: _PLAIN)
        pixels_BCHW: torch.Tensor = args[0] if args else kwargs["pixel_values"]
        named = {name: kwargs[name] for name in ("interpolate_pos_encoding",) if kwargs.get(name) is not None}
        size = (*pixels_BCHW.shape[-2:], *named.items())
        if size not in self._by_size:
            self._by_size[size] = self._record(pixels_BCHW[:1], named)
        return self._by_size[size]

    @torch.no_grad()
    def _record(self, pixels_BCHW: torch.Tensor, named: Mapping[str, Any]) -> dict[int, LayerCall]:
        calls: dict[int, LayerCall] = {}
        decoder = self._stack.decoder
        with evaluating(self._model), unnoticed(decoder), ExitStack() as undo:
            for index, layer in enumerate(self._stack.layers):
                undo.enter_context(without_forward_hooks(layer))  # it is no forward of theirs

                def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                    calls[index] = LayerCall.of(args, kwargs)

                layer.register_forward_pre_hook(record, with_kwargs=True)  # gone with the others
            decoder.forward(pixel_values=pixels_BCHW, **named)
        return calls


def _is_of_numbers(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_of_numbers(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)
