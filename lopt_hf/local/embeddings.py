"""An input embedding and an LM head that share a weight, which belong to different blocks."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

__all__ = ["is_untied", "separate_embeddings", "untie_output_embeddings"]

# On an LM head whose weight has been copied; another trainer of the same model has to know
_UNTIED = "_has_weight_of_its_own"


def is_untied(model: PreTrainedModel) -> bool:
    """Tells whether the LM head has been given a weight of its own, by whichever trainer of this model."""
    return hasattr(model.get_output_embeddings(), _UNTIED)


def separate_embeddings(model: PreTrainedModel, tied_embeddings: str) -> None:
    """Keeps the task's gradient out of an input embedding that shares its weight with the LM head.

    Args:
        model: The model; nothing is done where the two are apart, or do not learn.
        tied_embeddings: `"untie"` gives the head a copy, `"freeze"` freezes both.

    Raises:
        ValueError: If the weight to copy has been sharded already.
    """
    embeddings: Any = model.get_input_embeddings()
    shared = {id(parameter) for parameter in embeddings.parameters()}
    tied = [p for p in model.get_output_embeddings().parameters() if id(p) in shared and p.requires_grad]  # type: ignore[union-attr]
    if not tied:
        return
    if tied_embeddings == "freeze":
        for parameter in tied:
            parameter.requires_grad_(False)
        return
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "tied_embeddings='untie' does not work under DeepSpeed ZeRO-3, which has already sharded the weight to "
            "copy; set it to 'freeze', or use ZeRO-2."
        )
    untie_output_embeddings(model)


def untie_output_embeddings(model: PreTrainedModel) -> bool:
    """Gives the LM head a weight of its own if it shares the input embedding's (LoPT paper, Sec. 3, and code).

    Without it the task gradient would reach the input embedding, which belongs to the first block, through the head.
    The config says so (`tie_word_embeddings=False`), so that the saved checkpoint loads as it was trained.

    Returns:
        Whether the weights had been tied.

    Raises:
        ValueError: If an adapter keeps them tied.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head.weight is not embeddings.weight:
        return False
    if "weight" not in dict(head.named_parameters(recurse=False)):  # a wrapper, which PEFT ties anew when it loads it
        raise ValueError(
            "ensure_weight_tying=True makes one weight of the adapter's input embedding and LM head, which belong to "
            "the first and to the last block; leave it out, so that each learns for itself, or set tied_embeddings to "
            "'freeze'."
        )
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    setattr(head, _UNTIED, True)
    model.config.get_text_config(decoder=True).tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    _untie_bias(model, head)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
    return True


def _untie_bias(model: PreTrainedModel, head: Any) -> None:
    """Gives the other name of an LM head's bias a tensor of its own; only checkpoints have it (BERT).

    The config unties it with the weight, so that loading expects both, while of a shared tensor one name is saved.
    """
    bias = vars(head).get("_parameters", {}).get("bias")
    if bias is None:
        return
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is bias and module is not head:
                setattr(module, name, nn.Parameter(bias.detach().clone(), requires_grad=False))
