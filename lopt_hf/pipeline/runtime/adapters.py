"""Adapters on a part of a model, with the same start as on the whole model."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, set_seed

__all__ = ["add_adapter"]

# What LoRA can start from without reading the weights of the layer that it adapts.
_WITHOUT_BASE_WEIGHTS = (True, False, "gaussian")


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig, seed: int) -> PeftModel:
    """Wraps one stage's part of a model, its adapters being those that the whole model would start with.

    The random state runs through the layers in order, so a part alone would draw other numbers. A copy of the whole
    model without weights draws them all, which takes the memory of the whole model's adapters for a moment. What is
    taken from the weights (trained modules and biases, DoRA's magnitudes) is taken from the stage's own.

    Args:
        model: The stage's part of the model.
        peft_config: The adapter's config.
        seed: What `set_seed` gets before the adapters are made.

    Raises:
        ValueError: If the adapter starts from the weights of the layers that it adapts, or from weights and random
            numbers together.
    """
    _check_start(peft_config)
    whole_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    with torch.device("meta"):
        whole = whole_class._from_config(model.config)
    for module in whole.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Not a number, so that what an adapter makes of weights is told from what it draws.
            unknown = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(unknown, requires_grad=False))
    set_seed(seed)
    # First: it also settles which layers "all-linear" and the like mean, which a part alone would tell otherwise.
    drawn = dict(get_peft_model(whole, peft_config).named_parameters())
    adapted = get_peft_model(model, peft_config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and not drawn[name].isnan().any():
                parameter.copy_(drawn[name])
    return adapted


def _check_start(peft_config: PeftConfig) -> None:
    settings = peft_config.to_dict()
    start: Any = settings.get("init_lora_weights", True)
    if start not in _WITHOUT_BASE_WEIGHTS:
        raise ValueError(
            f"init_lora_weights={start!r} reads the weights of layers that a stage does not hold; set it to True or "
            "'gaussian'."
        )
    if start is False and settings.get("use_dora"):
        raise ValueError(
            "init_lora_weights=False with use_dora=True makes magnitudes from weights and random numbers together, "
            "which a stage would draw otherwise; set init_lora_weights to True or 'gaussian'."
        )
