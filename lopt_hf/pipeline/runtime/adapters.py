"""Adapters on a part of a model, with the same start as on the whole model."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, set_seed

from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.pipeline.runtime.cutting import on_meta, skeleton_of
from lopt_hf.pipeline.runtime.stage import Absent, AbsentEmbedding, PassThrough

__all__ = ["adapt_saved_stage", "adapt_stage", "add_adapter", "check_start"]

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
            numbers together, or if it adapts nothing that the stage has.
    """
    check_start(peft_config)
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
    adapted = adapt_stage(model, whole, peft_config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and not drawn[name].isnan().any():
                parameter.copy_(drawn[name])
    return adapted


def adapt_stage(model: PreTrainedModel, whole: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Wraps a stage's part of a model, which adapts what it has of the modules that the adapter is for.

    Args:
        model: The stage's part.
        whole: The whole model, wrapped by the same config; its weights do not matter.
        peft_config: The adapter's config.

    Raises:
        ValueError: If it has none of them.
    """
    absent = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Absent | AbsentEmbedding) and isinstance(whole.get_submodule(name), BaseTunerLayer)
    ]
    try:
        with _excluding(peft_config, absent):
            return get_peft_model(model, peft_config)
    except ValueError as error:  # all were found in the whole model
        own = [i for i, layer in enumerate(find_decoder_stack(model).layers) if not isinstance(layer, PassThrough)]
        targets: Any = getattr(peft_config, "target_modules", None)
        named = sorted(targets) if isinstance(targets, set) else targets
        raise ValueError(
            f"target_modules={named!r} adapts nothing on the stage of layers {own[0]} to {own[-1]}, which would have "
            "nothing to train; name modules of every stage's layers too."
        ) from error


def adapt_saved_stage(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Wraps a stage's part of a model for the adapter's weights that a checkpoint holds.

    Args:
        model: The stage's part.
        peft_config: The adapter's config, from the checkpoint.
    """
    with on_meta():
        whole = skeleton_of(type(model), model.config)
        get_peft_model(whole, copy.deepcopy(peft_config))
    return adapt_stage(model, whole, peft_config)


@contextmanager
def _excluding(peft_config: Any, names: Sequence[str]) -> Iterator[None]:
    """Lets PEFT pass over modules; what is saved of the adapter does not tell of it, for other stages have them."""
    if not names:
        yield
        return
    before = peft_config.exclude_modules
    if isinstance(before, str):
        peft_config.exclude_modules = "|".join([f"(?:{before})", *map(re.escape, names)])
    else:
        peft_config.exclude_modules = [*(before or ()), *names]
    try:
        yield
    finally:
        peft_config.exclude_modules = before


def check_start(peft_config: PeftConfig) -> None:
    """Raises `ValueError` if an adapter starts from weights that a stage does not hold."""
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
