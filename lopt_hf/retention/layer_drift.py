"""Relative drift of the weights of each layer."""

from collections.abc import Iterator
from itertools import zip_longest

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.meters.drift import relative_drift
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.weights import load_pair

__all__ = ["drift_by_layer", "layer_drift"]


def layer_drift(baseline: ModelReference, model: ModelReference) -> dict[str, float]:
    """Relative weight drift `||W - W0|| / ||W0||` of each layer, from two models on disk or on the hub.

    Both are loaded as by `load_pair`, in the type that the model was saved in.

    Returns:
        `embeddings`, `0` to `N-1`, and `rest` (final norm, LM head, learned positions).

    Raises:
        ValueError: If the models differ in more than their weights.
    """
    return drift_by_layer(*load_pair(baseline, model))


def drift_by_layer(before: PreTrainedModel, after: PreTrainedModel) -> dict[str, float]:
    """As `layer_drift`, for models in memory.

    Raises:
        ValueError: If the models differ in more than their weights.
    """
    drift: dict[str, float] = {}
    for (name, old), (other, new) in zip_longest(_parts(before), _parts(after), fillvalue=("nothing", [])):
        if name != other or [weight.shape for weight in old] != [weight.shape for weight in new]:
            raise ValueError(
                f"weights of the baseline's {name} and the model's {other} differ in number or shape, so there is no "
                "drift to tell; give models of one architecture, or leave drift out (--no-drift)."
            )
        drift[name] = relative_drift(zip(old, new, strict=True))
    return drift


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Names and weights of embeddings, layers and the rest; a tied LM head counts in both places."""
    stack = find_decoder_stack(model)
    embeddings = list(model.get_input_embeddings().parameters())
    layers = [list(layer.parameters()) for layer in stack.layers]
    placed = {id(weight) for weights in (embeddings, *layers) for weight in weights}
    head = model.get_output_embeddings()
    output = list(head.parameters()) if isinstance(head, nn.Module) else []
    rest = [weight for weight in model.parameters() if id(weight) not in placed | {id(weight) for weight in output}]
    yield "embeddings", [weight.detach() for weight in embeddings]
    for number, layer in enumerate(layers):
        yield str(number), [weight.detach() for weight in layer]
    yield "rest", [weight.detach() for weight in (*rest, *output)]
