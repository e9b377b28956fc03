"""Small image classifiers from random weights, with their image processors."""

from typing import Any

from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from lopt_hf.common.architectures import ARCHITECTURES

__all__ = ["make_small_classifier"]

# Ours: eight layers cut into up to eight blocks, small enough for a CPU
_VIT: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 192}
# Nine residual layers of two convolutions in three stages (He et al. 2015, Sec. 4.2), behind the stem of transformers
_RESNET20: dict[str, Any] = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64],
    "depths": [3, 3, 3],
    "layer_type": "basic",
}


def make_small_classifier(
    architecture: str, image_size: int | None, labels: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """Makes a small image classifier from random weights, and its image processor.

    Args:
        architecture: One of `ARCHITECTURES`.
        image_size: Side of its images in pixels. Default: that of the architecture.
        labels: What its config says of the classes, `num_labels` at least.
    """
    size = image_size or ARCHITECTURES[architecture]
    processor = ViTImageProcessor(size={"height": size, "width": size})
    if architecture == "resnet20":
        return ResNetForImageClassification(ResNetConfig(**_RESNET20, **labels)), processor
    patch = max(1, size // 4)  # ours: 16 patches, for a CPU
    return ViTForImageClassification(ViTConfig(image_size=size, patch_size=patch, **_VIT, **labels)), processor
