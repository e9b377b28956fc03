"""The stack of layers that a model is cut in: a language model's decoder layers, or an image classifier's layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lopt_hf.local.blocks import DecoderStack, find_decoder_stack

__all__ = ["example_image", "find_image_stack", "find_stack", "is_image_classifier"]

# Side of the image for a model that takes any: enough for six halvings, which no ResNet has
ANY_SIZE = 64


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
