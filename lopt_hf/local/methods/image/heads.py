"""What stands between an image classifier's block and its local loss: classifiers of several kinds.

Shapes: B batch, T tokens, D hidden channels, C channels of a feature map, H height, W width, L classes.
"""

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.layer_calls import evaluating, output_hidden
from lopt_hf.local.ownership import TRACE_ERRORS, feeds_first_layer
from lopt_hf.local.stacks import DecoderStack, example_image
from lopt_hf.local.stand_ins import PixelsAsHidden

__all__ = [
    "MapHead",
    "ModelTail",
    "TokenHead",
    "has_one_shape",
    "layer_shapes",
    "make_classifier",
]


@torch.no_grad()
def layer_shapes(model: PreTrainedModel, stack: DecoderStack) -> list[torch.Size]:
    """The shapes of the layers' outputs for one image, in the order of the layers; the model stays as it is."""
    shapes: list[torch.Size] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shapes.append(output_hidden(output).shape)

    with ExitStack() as hooks:
        for layer in stack.layers:
            hooks.enter_context(layer.register_forward_hook(record))
        _run_once(model)
    return shapes


def _run_once(model: PreTrainedModel) -> torch.Tensor:
    """The logits of one image, in evaluation."""
    weight = next(model.parameters())
    with evaluating(model), torch.random.fork_rng(devices=[]):
        logits_BL: torch.Tensor = model(
            pixel_values=example_image(model.config, weight.device).to(weight.dtype)
        ).logits
    return logits_BL


def has_one_shape(shapes: list[torch.Size]) -> bool:
    """Tells whether all layers hand on hidden states of one shape (1, T, D), as in ViT."""
    return len(set(shapes)) == 1 and len(shapes[0]) == 3


class ModelTail(nn.Module):
    """A copy of what a model does behind its layers (final norm, pooling, classifier): (B, T, D) -> (B, L).

    Args:
        model: An image classifier whose layers all hand on hidden states of one shape.
        stack: Its layers.
    """

    def __init__(self, model: PreTrainedModel, stack: DecoderStack) -> None:
        super().__init__()
        before = [child for name, child in stack.decoder.named_children() if feeds_first_layer(stack, name)]
        memo: dict[int, Any] = {id(stack.layers): nn.ModuleList(), id(model.config): model.config}
        memo |= {id(child): PixelsAsHidden(model.dtype) for child in before}
        self.tail = copy.deepcopy(model, memo).requires_grad_(True)
        self._check(model, stack)

    @torch.no_grad()
    def _check(self, model: PreTrainedModel, stack: DecoderStack) -> None:
        """Raises `ValueError` if the copy does not make of the last layer's output what the model makes of it."""
        outputs: list[torch.Tensor] = []
        with stack.layers[-1].register_forward_hook(lambda _, args, output: outputs.append(output_hidden(output))):
            expected_BL = _run_once(model)
        try:
            with evaluating(self):
                is_same = torch.allclose(self(outputs[0]), expected_BL, rtol=1e-3, atol=1e-5)
        except TRACE_ERRORS:  # its embeddings hand on more than hidden states (Data2Vec)
            is_same = False
        if not is_same:
            raise ValueError(
                f"model={type(model).__name__}: what follows its layers does not run by itself, so that no block can "
                "learn through a copy of it; leave the early blocks to the task loss (method 'freeze' or 'reach', "
                "local_objective='none')."
            )

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        logits_BL: torch.Tensor = self.tail(pixel_values=h_BTD).logits
        return logits_BL


class MapHead(nn.Sequential):
    """A classifier of feature maps (B, C, H, W) -> (B, L): a 3 x 3 convolution, batch norm, ReLU, mean, linear.

    Supervised local learning of convolutional networks has such auxiliary networks (MLAAN, arXiv 2406.16633).

    Args:
        channels: C.
        num_labels: L.
    """

    def __init__(self, channels: int, num_labels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_labels),
        )


class TokenHead(nn.Module):
    """A classifier of tokens without a class token (B, T, D) -> (B, L): layer norm, mean over the tokens, linear.

    Args:
        hidden_size: D.
        num_labels: L.
    """

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        logits_BL: torch.Tensor = self.classifier(self.norm(h_BTD).mean(dim=1))
        return logits_BL


def make_classifier(model: PreTrainedModel, stack: DecoderStack, shapes: list[torch.Size], layer: int) -> nn.Module:
    """Makes the classifier of hidden states as a layer hands them on.

    Where all layers hand on the same shape it starts as a copy of the model's own tail, else from random weights.

    Args:
        model: The image classifier.
        stack: Its layers.
        shapes: What `layer_shapes` gave.
        layer: The layer's index.
    """
    if has_one_shape(shapes):
        return ModelTail(model, stack)
    shape, labels = shapes[layer], int(model.config.num_labels or 0)
    return MapHead(shape[1], labels) if len(shape) == 4 else TokenHead(shape[2], labels)
