"""Which block owns which parameter: what runs before the layers is the first one's, what runs after them the last's.

What runs before is not told by its name but traced: on a twin of the decoder that has shapes and no weights, the
graph of what the first layer is given leads back to the parameters that feed it.
"""

import copy
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from lopt_hf.common.upstream.torch import without_modes
from lopt_hf.local.blocks import Block
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.layer_calls import stop_at
from lopt_hf.local.stacks import DecoderStack, example_image

__all__ = [
    "feeds_first_layer",
    "leaves_behind",
    "modules_before_decoder",
    "parameters_before_decoder",
    "parameters_by_block",
]


def parameters_by_block(
    model: nn.Module, stack: DecoderStack, blocks: Sequence[Block]
) -> list[dict[str, nn.Parameter]]:
    """Tells which block owns each parameter of a model.

    A block owns its layers; the first one also owns what runs before the layers (embeddings, a vision tower and its
    projector), the last one what runs after them (final norm, LM head).

    Args:
        model: The model that holds `stack`, PEFT-wrapped or not.
        stack: Its decoder.
        blocks: The cut of the decoder.

    Returns:
        For each block, its parameters by their names in `model`.
    """
    owner = {
        id(parameter): block.index
        for block in blocks
        for layer in stack.layers[block.start : block.stop]
        for parameter in layer.parameters()
    }
    before = {
        id(parameter)
        for name, parameter in stack.decoder.named_parameters()
        if id(parameter) not in owner and feeds_first_layer(stack, name)
    }
    before |= {id(parameter) for parameter in parameters_before_decoder(model, stack).values()}
    owned: list[dict[str, nn.Parameter]] = [{} for _ in blocks]
    for name, parameter in model.named_parameters():
        owned[owner.get(id(parameter), 0 if id(parameter) in before else -1)][name] = parameter
    return owned


def feeds_first_layer(stack: DecoderStack, name: str) -> bool:
    """Tells whether a module or a parameter of a decoder runs before its layers.

    Args:
        stack: The decoder.
        name: The dotted name in the decoder. What PEFT has put into or around a module counts as that module.
    """
    traced = _trace(stack)
    return any(name == module or name.startswith(f"{module}.") or module.startswith(f"{name}.") for module in traced)


def parameters_before_decoder(model: nn.Module, stack: DecoderStack) -> dict[str, nn.Parameter]:
    """The parameters outside a decoder that work on what goes into it: a vision tower, its projector.

    Such are all that a model with parts of several kinds (text, vision, audio) has beside its text decoder and the
    branch of its LM head, and what PEFT puts before a model (the encoder of a prompt).

    Args:
        model: The model that holds `stack`, PEFT-wrapped or not.
        stack: Its decoder.

    Returns:
        The parameters by their names in `model`.
    """
    base_model: Any = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    of_base = {id(parameter) for parameter in base_model.parameters()}
    elsewhere = {id(parameter) for parameter in stack.decoder.parameters()}
    config = base_model.config
    if config.get_text_config(decoder=True) is config:  # a language model: all that it has beside is its head's
        elsewhere |= of_base
    else:
        elsewhere |= {id(parameter) for module in _branch_of_head(base_model) for parameter in module.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in elsewhere and not LocalHeads.is_name_of_head(name)
    }


def modules_before_decoder(model: PreTrainedModel, stack: DecoderStack) -> list[str]:
    """The names of the largest modules that hold `parameters_before_decoder` and nothing of the decoder.

    A parameter that stands beside the decoder is there by its own name (LLaVA-NeXT's end of a row of an image).
    """
    around = {id(module) for module in model.modules() if stack.decoder in set(module.modules())}
    names: dict[str, None] = {}
    for parameter in parameters_before_decoder(model, stack):
        parts = parameter.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
        names[next((prefix for prefix in prefixes if id(model.get_submodule(prefix)) not in around), parameter)] = None
    return list(names)


def _branch_of_head(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The LM head, and the largest module that holds it and nothing of the decoder."""
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    assert head is not None
    yield head
    for child in model.children():
        parts = set(child.modules())
        if head in parts and decoder not in parts:
            yield child


# ---- The trace ----


# How a decoder of somebody's own may fail that does not run on shapes alone
TRACE_ERRORS: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError, ImportError)
TRACE_ERRORS += (LookupError, RuntimeError, TypeError, ValueError)
_traced: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()


def _trace(stack: DecoderStack) -> frozenset[str]:
    """The dotted names in a decoder of the modules, or parameters beside modules, that feed its first layer."""
    decoder, kind = cast(Any, stack.decoder), cast(Any, type(stack.decoder))
    if decoder not in _traced:
        name = next(name for name, module in decoder.named_modules() if module is stack.layers[0])
        try:
            _traced[decoder] = _trace_twin(kind, _Config(decoder.config), name)
        except TRACE_ERRORS:
            embeddings = (name for name, module in decoder.named_modules() if isinstance(module, nn.Embedding))
            _traced[decoder] = frozenset(embeddings)  # what this misses, `ReachCheck` finds
    return _traced[decoder]


class _Config:
    """A configuration that is equal to another of the same values."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self._text = config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


class _Yes(TorchFunctionMode):
    """Answers what a forward asks of the values of a mask that is all ones, and that has none on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func in (torch.Tensor.__bool__, torch.Tensor.item) else func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=64)
def _trace_twin(decoder_class: Any, config: _Config, first_layer: str) -> frozenset[str]:
    own = copy.deepcopy(config.config)
    own._attn_implementation = "eager"  # whose mask does not depend on what a mask holds
    # The twin allocates, computes and draws nothing, and nobody who counts operations is to see it.
    with without_modes(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = decoder_class(own)
        with _Yes(), torch.enable_grad(), stop_at(twin.get_submodule(first_layer)) as calls:
            twin(**_example_inputs(decoder_class, own))
    args, kwargs = calls[0]
    leaves = leaves_behind([*args, *kwargs.values()])
    # With a weight all of its module counts: where PEFT wraps a module its weight is renamed.
    names = (name for name, parameter in twin.named_parameters() if parameter in leaves)
    return frozenset(name.rpartition(".")[0] or name for name in names)


def _example_inputs(decoder_class: Any, config: PretrainedConfig) -> dict[str, Any]:
    if decoder_class.main_input_name == "pixel_values":
        return {"pixel_values": example_image(config, "meta")}
    tokens_BT = torch.zeros(1, 2, dtype=torch.long)
    return {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "use_cache": False}


def leaves_behind(values: Iterable[Any]) -> set[torch.Tensor]:
    """The leaves of the autograd graph that lead to the tensors among some values; nothing is computed."""
    todo: list[Any] = [value.grad_fn for value in values if isinstance(value, torch.Tensor)]
    seen, leaves = set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a graph begins
            leaves.add(node.variable)
        todo += [parent for parent, _ in node.next_functions]
    return leaves
