"""The stack of layers that a model is cut in: a language model's decoder layers, or an image classifier's layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = [
    "DecoderStack",
    "check_architecture",
    "example_image",
    "find_decoder_stack",
    "find_image_stack",
    "find_stack",
    "is_image_classifier",
]

# Decoders whose layers are plain modules, from before `GradientCheckpointingLayer`.
_PLAIN_LAYERS = frozenset({"ctrl", "gpt_neox_japanese", "openai-gpt"})

# Why what looks like a decoder cannot be cut, by its config's `model_type`.
_UNCUT = {
    "cpmant": "one learned position bias feeds all of its layers, so that no block's gradient stays in the block",
    "dory": "its middle layers run several times each, in loops, and not once from the first to the last",
    "hrm_text": "its two stacks of layers run several times each, in turns, and not once from the first to the last",
    "reformer": "its layers are reversible: they make their gradients themselves, where no boundary can stop them",
    "xlm": "its layers are no modules of their own that could be cut, but lists of attentions and of MLPs",
    "xlnet": "it is trained on permutations of the tokens, with two streams of hidden states",
    "zaya": "each layer's router reads what the router before it made, a second way for gradients between layers",
}

# Side of the image for a model that takes any: enough for six halvings, which no ResNet has
ANY_SIZE = 64


@dataclass(frozen=True)
class DecoderStack:
    """The layers that a model is cut in, and the module that runs them.

    Attributes:
        decoder: The module whose forward runs embeddings, layers and final norm.
        layers: Its decoder layers, in the order in which they run.
        hidden_size: Width of the hidden states between the layers, in channels.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    hidden_size: int


def find_stack(model: PreTrainedModel) -> DecoderStack:
    """Finds the layers that a model is cut in, by its structure.

    Args:
        model: A `transformers` causal language model or image classifier (for a `PeftModel`, its base model).

    Raises:
        ValueError: If it is neither, or if no or several stacks of layers fit.
    """
    return find_image_stack(model) if is_image_classifier(model) else find_decoder_stack(model)


def is_image_classifier(model: PreTrainedModel) -> bool:
    """Tells whether a model takes pixels and generates nothing."""
    return model.main_input_name == "pixel_values" and not model.can_generate()


def check_architecture(name: str, text_config: PretrainedConfig) -> None:
    """Raises if a model's layers are known not to run one after the other; its weights need not be loaded.

    Args:
        name: What the model is called in the message.
        text_config: The config of its text decoder.

    Raises:
        ValueError: With the reason.
    """
    layerdrop = vars(text_config).get("layerdrop")
    if layerdrop:
        raise ValueError(
            f"model={name} leaves out layers at random (layerdrop={layerdrop}), and with one of them the "
            "boundary behind it; set it to 0 in the model's config."
        )
    reason = _UNCUT.get(text_config.model_type)
    if reason is not None:
        raise ValueError(f"model={name} cannot be trained block by block: {reason}; pass another model.")


def find_decoder_stack(model: PreTrainedModel) -> DecoderStack:
    """Finds the decoder layers of a causal language model by its structure, whatever its attributes are called.

    Args:
        model: A `transformers` causal language model (for a `PeftModel`, pass `get_base_model()`).

    Raises:
        ValueError: If the model is an encoder or an encoder-decoder, or if no or several stacks of layers fit.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"model={name} is an encoder-decoder; local learning needs a decoder-only language model.")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"model={name} has no language-modelling head; load it with `AutoModelForCausalLM` or pass another model."
        )
    text_config = model.config.get_text_config(decoder=True)
    check_architecture(name, text_config)
    decoder = _decoder_of(model)
    layers = _only_stack(name, decoder, text_config)
    if any(vars(module).get("is_causal") is False for module in layers.modules()):
        raise ValueError(f"model={name} attends in both directions (an encoder); pass a causal language model.")
    return DecoderStack(decoder=decoder, layers=layers, hidden_size=text_config.hidden_size)


def _decoder_of(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    # ModernBERT-decoder calls its LM head `decoder`.
    return model.base_model if decoder is model.get_output_embeddings() else decoder


def _only_stack(name: str, decoder: nn.Module, text_config: PretrainedConfig) -> nn.ModuleList:
    layer_type = nn.Module if text_config.model_type in _PLAIN_LAYERS else GradientCheckpointingLayer
    stacks = {
        path: module
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(m, layer_type) for m in module)
    }
    expected = text_config.num_hidden_layers
    fitting = [stack for stack in stacks.values() if len(stack) == expected]
    if not fitting:  # LongCat has two attentions to a layer, and counts them
        fitting = [stack for stack in stacks.values() if len(stack) == vars(text_config).get("num_layers")]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{path!r} of {len(stack)}" for path, stack in stacks.items())
    plain = "" if found else f", and no list of `{GradientCheckpointingLayer.__name__}` by which layers are known"
    raise ValueError(
        f"model={name}: local learning needs one stack of the {expected} decoder layers that its config tells of, "
        f"which run once, one after the other; it has {found or 'none'}{plain}. Pass another model, or report the "
        "architecture."
    )


def find_image_stack(model: PreTrainedModel) -> DecoderStack:
    """Finds the layers of an image classifier.

    They are one list of layers (ViT, DeiT, DINOv2), or the layers of all stages one after the other, so that a block
    may end within a stage (ResNet); where a stage ends in a module that halves the image (Swin's patch merging), that
    is a layer of its own.

    Args:
        model: A `transformers` image classifier.

    Raises:
        ValueError: If no or several stacks of layers fit.
    """
    decoder, config = model.base_model, model.config
    if decoder is model:
        raise ValueError(
            f"model={type(model).__name__} has no classifier beside its backbone; load it with "
            "`AutoModelForImageClassification`."
        )
    depths = vars(config).get("depths")
    found = list(_plain_stacks(decoder, config) if depths is None else _staged_stacks(decoder, list(depths)))
    if len(found) != 1:
        raise ValueError(
            f"model={type(model).__name__}: local learning needs one stack of layers that run once, one after the "
            f"other, as in ViT, DeiT, DINOv2, Swin and ResNet; {len(found)} fit what its config tells of. Pass "
            "another model, or report the architecture."
        )
    sizes = vars(config).get("hidden_sizes")
    return DecoderStack(decoder, found[0], sizes[-1] if sizes else config.hidden_size)


def _plain_stacks(decoder: nn.Module, config: PretrainedConfig) -> Iterator[nn.ModuleList]:
    for module in decoder.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != config.num_hidden_layers:
            continue
        if all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            yield module


def _staged_stacks(decoder: nn.Module, depths: list[int]) -> Iterator[nn.ModuleList]:
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(depths):
            stages = [_layers_of_stage(stage, depth) for stage, depth in zip(module, depths, strict=True)]
            if all(stages):
                yield nn.ModuleList(layer for stage in stages for layer in stage)


def _layers_of_stage(stage: nn.Module, depth: int) -> list[nn.Module]:
    """The layers of a stage in order, and what halves the image behind them; empty if it is built in another way."""
    children = list(stage.children())
    first = children[0] if children else None
    if not isinstance(first, nn.ModuleList | nn.Sequential) or len(first) != depth or len(children) > 2:
        return []
    return [*first, *children[1:]]


def example_image(config: PretrainedConfig, device: torch.device | str = "cpu") -> torch.Tensor:
    """Makes one black image of the size that a model is for, (1, channels, height, width).

    Args:
        config: The model's config.
        device: Where to make it.
    """
    size: Any = vars(config).get("image_size") or ANY_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(1, config.num_channels, height, width, device=device)
