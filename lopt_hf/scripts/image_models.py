"""The image classifiers that `lopt-hf image` trains: a checkpoint's, or a small one from random weights."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)

from lopt_hf.common.architectures import ARCHITECTURES
from lopt_hf.common.settings import check_at_least, check_choice, option
from lopt_hf.data.image_models import make_small_classifier

__all__ = ["ImageSourceArguments", "make_image_model"]

logger = logging.getLogger(__name__)


@dataclass
class ImageSourceArguments:
    """Which model to train.

    Parameters:
        model_name_or_path: An image classifier's checkpoint. Default: one of `architecture` from random weights.
        architecture: What to make from random weights: `"vit"`, a small one, or `"resnet20"`.
        image_size: Side of its images in pixels. Default: 32 for `"vit"`, 64 for `"resnet20"`, whose stem halves
            them twice.
    """

    model_name_or_path: str | None = option(
        None, "Hub id or local folder of an image classifier. Default: from random weights."
    )
    model_revision: str = option("main", "Its version: branch, tag or commit.")
    architecture: str = option(
        "vit", "What to make from random weights: 'vit', a small one, or 'resnet20'.", list(ARCHITECTURES)
    )
    image_size: int | None = option(
        None, "Side of its images in pixels. Default: 32 for 'vit', 64 for 'resnet20', whose stem halves them twice."
    )

    def __post_init__(self) -> None:
        check_choice("architecture", self.architecture, list(ARCHITECTURES))
        check_at_least("image_size", self.image_size, 8)
        if self.model_name_or_path is None and self.model_revision != "main":
            raise ValueError(
                f"model_revision={self.model_revision!r} does nothing without model_name_or_path; leave it out."
            )
        if self.model_name_or_path is not None and self.architecture != "vit":
            raise ValueError(
                f"architecture={self.architecture!r} does nothing with model_name_or_path="
                f"{self.model_name_or_path!r}, which has one; leave one of them out (over a recipe's: "
                "`--architecture vit`, the default)."
            )
        if self.model_name_or_path is not None and self.image_size is not None:
            raise ValueError(
                f"image_size={self.image_size} does nothing with model_name_or_path={self.model_name_or_path!r}, "
                "whose image processor has one; leave it out."
            )


def make_image_model(
    model_args: ImageSourceArguments, names: Sequence[str], keeps_classifier: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Loads or makes an image classifier for these classes, and its image processor; weights are in fp32.

    A checkpoint with as many classes keeps their names where the data have none.

    Args:
        model_args: Which one.
        names: The names of the classes; their numbers where the data have none.
        keeps_classifier: Whether blocks learn through a checkpoint's classifier as it is, whose classes have to be the
            data's then.

    Raises:
        OSError: If the checkpoint cannot be found.
        ValueError: If its classes are others, or it has no classifier, and its classifier is kept.
    """
    labels: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if model_args.model_name_or_path is None:
        return make_small_classifier(model_args.architecture, model_args.image_size, labels)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    try:
        saved = AutoConfig.from_pretrained(name, revision=revision)
        if saved.num_labels == len(names) and not _are_named(names):
            labels = {}
        model, loaded = AutoModelForImageClassification.from_pretrained(
            name,
            output_loading_info=True,
            revision=revision,
            dtype=torch.float32,  # transformers' default is the checkpoint's, which may be too coarse to train in
            ignore_mismatched_sizes=saved.num_labels != len(names),
            **labels,
        )
        processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    except OSError as error:
        raise OSError(f"model_name_or_path={name!r} cannot be loaded: {error}") from error
    if (lack := _lack_of_classifier(model, loaded, saved.num_labels)) is not None:
        if keeps_classifier:
            raise ValueError(
                f"model_name_or_path={name!r} {lack}, and a classifier from random weights would stay as it is; use "
                "method 'local'."
            )
        logger.warning("%s %s: the classifier starts from random weights.", name, lack)
    elif _are_named(names) and (difference := _first_difference(saved, names)) is not None:
        message = f"model_name_or_path={name!r} has other classes than the data ({difference})"
        if keeps_classifier:
            raise ValueError(f"{message}, and its classifier would stay as it is; use method 'local'.")
        logger.warning("%s: its classifier is trained to know these, and takes their names.", message)
    return model, processor


def _lack_of_classifier(model: PreTrainedModel, loaded: Any, num_saved: int) -> str | None:
    """Why the classifier is drawn anew, if it is.

    Args:
        model: The model.
        loaded: What `from_pretrained` says that it has loaded.
        num_saved: How many classes the checkpoint's config has.
    """
    if any(not key.startswith(f"{model.base_model_prefix}.") for key in loaded["missing_keys"]):
        return "has no classifier"
    if loaded["mismatched_keys"] or num_saved != model.config.num_labels:
        return f"has {num_saved} classes, and the data {model.config.num_labels}"
    return None


def _are_named(names: Sequence[str]) -> bool:
    return list(names) != [str(number) for number in range(len(names))]


def _first_difference(saved: Any, names: Sequence[str]) -> str | None:
    """The first class of a checkpoint, of those that have names, that is another one in the data."""
    for number, name in enumerate(names):
        other = (saved.id2label or {}).get(number, "")
        if other not in (name, f"LABEL_{number}", ""):
            return f"label {number} is {other!r} there and {name!r} in the data"
    return None
