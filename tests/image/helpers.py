"""Tiny image classifiers from random weights, and images to train them on."""

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lopt_hf import LocalImageConfig, LocalImageTrainer, MLAANImageConfig

NUM_LABELS = 4
TOKENS = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "num_labels": NUM_LABELS}
LAYERS = 6  # of each


def make_model(family, seed=0, **changes):
    torch.manual_seed(seed)
    config_class, model_class, values = FAMILIES[family]
    return model_class(config_class(**{**values, **changes})).train()


FAMILIES = {
    "vit": (
        ViTConfig,
        ViTForImageClassification,
        {**TOKENS, "num_hidden_layers": LAYERS, "intermediate_size": 32},
    ),
    "deit": (
        DeiTConfig,
        DeiTForImageClassification,
        {**TOKENS, "num_hidden_layers": LAYERS, "intermediate_size": 32},
    ),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, {**TOKENS, "num_hidden_layers": LAYERS}),
    # Two stages of two and three layers, with a patch merging between them
    "swin": (
        SwinConfig,
        SwinForImageClassification,
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 2]}
        | {"window_size": 4, "num_labels": NUM_LABELS, "drop_path_rate": 0.0},
    ),
    # The same, whose loss is a mean over the micro-batch whatever `num_items_in_batch` says
    "swinv2": (
        Swinv2Config,
        Swinv2ForImageClassification,
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 2]}
        | {"window_size": 4, "num_labels": NUM_LABELS, "drop_path_rate": 0.0},
    ),
    "resnet": (
        ResNetConfig,
        ResNetForImageClassification,
        {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [3, 3], "layer_type": "basic"}
        | {"num_labels": NUM_LABELS},
    ),
}


def make_images(number=16, seed=0, size=16):
    """Random images, PNG-encoded in the data set as it keeps them."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=NUM_LABELS)})
    labels = generator.integers(0, NUM_LABELS, number).tolist()
    return Dataset.from_dict({"image": [Pillow.fromarray(p) for p in pixels], "label": labels}, features=features)


def options(folder, **changes):
    """Arguments of a run of three steps of four images."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def make_local_trainer(folder, family, **settings):
    """A trainer of three blocks, by MLAAN if a window is given."""
    config_class = MLAANImageConfig if "window" in settings else LocalImageConfig
    changes = {"num_blocks": 3, "optim": "sgd", "max_grad_norm": 1e9, **settings}
    return LocalImageTrainer(
        make_model(family), config_class(**options(folder, **changes)), train_dataset=make_images()
    )
