"""A twin of a decoder, of shapes and no weights, that runs until its first layer: what comes before the layers."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from lopt_hf.common.upstream.torch import without_modes
from lopt_hf.local.layer_calls import Call, stop_at
from lopt_hf.local.stacks import DecoderStack, example_image

__all__ = ["TRACE_ERRORS", "first_layer_of", "run_twin"]

# How a decoder of somebody's own may fail that does not run on shapes alone
TRACE_ERRORS: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError, ImportError)
TRACE_ERRORS += (LookupError, RuntimeError, TypeError, ValueError)


def first_layer_of(stack: DecoderStack) -> str:
    """The dotted name of the first layer in its decoder."""
    return next(name for name, module in stack.decoder.named_modules() if module is stack.layers[0])


def run_twin(
    decoder_class: Any, config: PretrainedConfig, first_layer: str, watch: Callable[[nn.Module], None] | None = None
) -> tuple[nn.Module, Call]:
    """Makes a twin of a decoder and runs it until its first layer.

    Nothing is allocated, computed or drawn, and nobody who counts operations sees it.

    Args:
        decoder_class: The decoder's class.
        config: Its config.
        first_layer: The dotted name of its first layer.
        watch: Called with the twin before it runs.

    Returns:
        The twin, and the arguments that its first layer is called with.

    Raises:
        Exception: One of `TRACE_ERRORS`, if the decoder does not run on shapes alone.
    """
    own = copy.deepcopy(config)
    own._attn_implementation = "eager"  # whose mask does not depend on what a mask holds
    with without_modes(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = decoder_class(own)
        if watch is not None:
            watch(twin)
        with _Yes(), torch.enable_grad(), stop_at(twin.get_submodule(first_layer)) as calls:
            twin(**_example_inputs(decoder_class, own))
    return twin, calls[0]


class _Yes(TorchFunctionMode):
    """Answers what a forward asks of the values of a mask that is all ones, and that has none on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func in (torch.Tensor.__bool__, torch.Tensor.item) else func(*args, **(kwargs or {}))


def _example_inputs(decoder_class: Any, config: PretrainedConfig) -> dict[str, Any]:
    if decoder_class.main_input_name == "pixel_values":
        return {"pixel_values": example_image(config, "meta")}
    tokens_BT = torch.zeros(1, 2, dtype=torch.long)
    return {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "use_cache": False}
