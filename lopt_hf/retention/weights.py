"""The weights of models on disk or on the hub, with an adapter's part in them."""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lopt_hf.retention.references import ModelReference

__all__ = ["load_merged", "load_pair"]


def load_pair(baseline: ModelReference, model: ModelReference) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Loads a baseline and a model to host memory.

    Both are in the type that the model was saved in, an adapter's base for an adapter: the rounding of an fp32
    baseline is no change of a bf16 model.

    Raises:
        ValueError: If one is an adapter that is no change of weights.
    """
    after = _load(model, "auto")
    before = _load(baseline, after.dtype)
    return _merged(before, baseline), _merged(after, model)


def load_merged(reference: ModelReference, dtype: torch.dtype) -> PreTrainedModel:
    """Loads one model to host memory in a type, an adapter's part computed in fp32.

    Raises:
        ValueError: As `load_pair`.
    """
    is_full = reference.adapter is None
    return _merged(_load(reference, dtype if is_full else torch.float32), reference).to(dtype)  # type: ignore[arg-type]


def _load(reference: ModelReference, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model, or an adapter's base."""
    return AutoModelForCausalLM.from_pretrained(reference.base, revision=reference.revision, dtype=dtype)


def _merged(model: PreTrainedModel, reference: ModelReference) -> PreTrainedModel:
    """Puts an adapter's part into its base, in fp32, which does not round it away."""
    if reference.adapter is None:
        return model
    adapted = PeftModel.from_pretrained(model.float(), reference.adapter, revision=reference.adapter_revision)
    try:
        return adapted.merge_and_unload()
    except (AttributeError, NotImplementedError) as error:  # of prompts and prefixes, which are no weights' change
        raise ValueError(
            f"the adapter {reference.name!r} ({adapted.active_peft_config.peft_type.value}) cannot be merged into its "
            "base's weights; give one that can, such as LoRA, or a full model."
        ) from error
