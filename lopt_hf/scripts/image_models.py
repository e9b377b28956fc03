"""The image classifiers that `lopt-hf image` trains: a checkpoint's, or a small one from random weights."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

__all__ = ["ARCHITECTURES", "make_image_model"]

logger = logging.getLogger(__name__)

# Ours: eight layers cut into up to eight blocks, small enough for a CPU
_VIT: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 192}
# Nine residual layers of two convolutions in three stages (He et al. 2015, Sec. 4.2), behind the stem of transformers
_RESNET20: dict[str, Any] = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64],
    "depths": [3, 3, 3],
    "layer_type": "basic",
}
ARCHITECTURES = {"vit": 32, "resnet20": 64}  # with the side of their images


def make_image_model(model_args: Any, names: Sequence[str]) -> tuple[PreTrainedModel, Any]:
    """Loads or makes an image classifier for these classes, and its image processor.

    Args:
        model_args: `ImageModelArguments`.
        names: The names of the classes.

    Raises:
        OSError: If the checkpoint cannot be found.
    """
    labels: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if model_args.model_name_or_path is None:
        return _make(model_args.architecture, model_args.image_size, labels)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    try:
        saved = AutoConfig.from_pretrained(name, revision=revision)
        model = AutoModelForImageClassification.from_pretrained(
            name, revision=revision, ignore_mismatched_sizes=saved.num_labels != len(names), **labels
        )
        processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    except OSError as error:
        raise OSError(f"model_name_or_path={name!r} cannot be loaded: {error}") from error
    if saved.num_labels != len(names):
        logger.warning(
            "The classifier of %s has %d classes, and the data %d: it starts from random weights.",
            name,
            saved.num_labels,
            len(names),
        )
    return model, processor


def _make(architecture: str, image_size: int | None, labels: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    size = image_size or ARCHITECTURES[architecture]
    processor = ViTImageProcessor(size={"height": size, "width": size})
    if architecture == "resnet20":
        return ResNetForImageClassification(ResNetConfig(**_RESNET20, **labels)), processor
    patch = max(1, size // 4)  # ours: 16 patches, for a CPU
    return ViTForImageClassification(ViTConfig(image_size=size, patch_size=patch, **_VIT, **labels)), processor
