"""Averages of a fine-tuned model's weights and its base's: what a method has to beat, as it costs no training.

WiSE-FT, https://huggingface.co/papers/2109.01903, Sec. 3: (1 - alpha) x base + alpha x fine-tuned, weight by weight.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from lopt_hf.retention.references import ModelReference, load_tokenizer
from lopt_hf.retention.weights import load_pair

__all__ = ["average_with_base", "save_average"]


@torch.no_grad()
def average_with_base(base: PreTrainedModel, model: PreTrainedModel, alpha: float) -> None:
    """Puts the average in the place of a model's weights, computed in fp32 and kept in their type.

    Args:
        base: What the model was fine-tuned from; a shared embedding that training has made two counts for both.
        model: The fine-tuned model, which is changed.
        alpha: Its weight, from 0, which leaves the base's bits, to 1, which leaves its own.

    Raises:
        ValueError: If the two differ in more than the values of their weights.
    """
    of_base = base.state_dict()  # has a shared weight under each of its names
    for name, weight in model.named_parameters():
        if name not in of_base or of_base[name].shape != weight.shape:
            raise ValueError(
                f"{name} of shape {tuple(weight.shape)} is not among the base's weights, so there is no average; "
                "average models of one architecture."
            )
        weight.copy_(torch.lerp(of_base[name].float(), weight.float(), alpha))


def save_average(base: str, model: Path, alpha: float, folder: Path) -> None:
    """Writes the average of a model, full or an adapter, with its base as a stock checkpoint.

    Args:
        base: Hub id or folder.
        model: Folder of the fine-tuned model.
        alpha: As in `average_with_base`; 1 writes an adapter into its base.
        folder: Where to.

    Raises:
        ValueError: As in `average_with_base`.
    """
    reference = ModelReference.find(str(model))
    before, after = load_pair(ModelReference.find(base), reference)
    average_with_base(before, after, alpha)
    after.save_pretrained(folder)
    load_tokenizer(reference).save_pretrained(folder)
