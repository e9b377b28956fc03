"""Image classifiers in `lopt-hf bench pipeline`.

Images are tensors when they are given to a method: neither decoding nor augmentation is measured, which every process
of a pipeline does for itself.

Shapes: B images of a micro-batch, L classes.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor, default_data_collator

from lopt_hf.bench.pipeline.method_run import MethodRun
from lopt_hf.bench.pipeline.task import ClippedApart, PipelineTask, clip_groups, make_config
from lopt_hf.data.image_models import make_small_classifier
from lopt_hf.local.methods.image.heads import layer_shapes
from lopt_hf.local.stacks import example_image, find_stack
from lopt_hf.pipeline.runtime.image.config import ImagePipelineConfig
from lopt_hf.pipeline.runtime.image.costs import measure_image_costs
from lopt_hf.pipeline.runtime.image.stage import check_stage_model, keep_image_stage
from lopt_hf.pipeline.runtime.image.trainer import ImageStageTrainer
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.stage import HiddenStateInput
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from lopt_hf.pipeline.split.model_costs import ModelCosts
from lopt_hf.trainers.image import (
    ImageTrainer,
    ImageTrainingArguments,
    LocalImageConfig,
    LocalImageTrainer,
    check_image_model,
)

__all__ = ["ImageTask"]

NUM_LABELS = 10  # of a model from random weights: CIFAR-10's


class _RandomImages(Dataset):
    """Images of noise and labels, the same in every process and for every number of steps.

    Args:
        count: How many.
        size: Channels, height and width.
        num_labels: How many classes there are.
        seed: What they are drawn from.
    """

    def __init__(self, count: int, size: tuple[int, ...], num_labels: int, seed: int) -> None:
        # Each by itself and uniform, so that of two lengths the shorter begins the longer.
        pixels, labels = (torch.Generator().manual_seed(seed) for _ in range(2))
        self.pixels = 2 * torch.rand(count, *size, generator=pixels) - 1
        self.labels = torch.randint(num_labels, (count,), generator=labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


class ImageTask(PipelineTask):
    """Classification of images of noise."""

    def prepare(self, settings: Any) -> None:
        """Nothing."""

    def find_model(self, settings: Any, folder: str) -> str:
        if settings.model is not None:
            return str(settings.model)
        torch.manual_seed(settings.seed)
        model, _ = make_small_classifier(settings.architecture, settings.image_size, {"num_labels": NUM_LABELS})
        path = str(Path(folder) / "model")
        model.save_pretrained(path)
        return path

    def num_layers(self, settings: Any, checkpoint: str) -> int:
        try:
            model = _load(checkpoint)
        except OSError as error:
            raise ValueError(
                f"model={settings.model!r} is neither a local image classifier nor one on a hub that can be reached; "
                "pass the path of a folder that holds a config.json."
            ) from error
        check_image_model(model)
        stack = find_stack(model)
        check_stage_model(model, stack)
        return len(stack.layers)

    def measure_costs(self, settings: Any, checkpoint: str) -> ModelCosts:
        model = _load(checkpoint)
        return measure_image_costs(
            model,
            settings.micro_batch_size,
            objective=settings.objective,
            image_size=_image_shape(settings, model)[1:],
            autocast=torch.bfloat16 if settings.dtype == "bfloat16" else None,
            accumulation_steps=settings.microbatches,
        )

    def make_config(self, run: MethodRun) -> ImageTrainingArguments:
        return make_config(run, ImagePipelineConfig, LocalImageConfig, ImageTrainingArguments)

    def make_trainer(self, run: MethodRun, plan: StagePlan | None, world: PipelineWorld | None) -> Any:
        model = _load(run.checkpoint)
        shared: dict[str, Any] = {
            "args": self.make_config(run),
            "train_dataset": _images(run, model),
            "data_collator": default_data_collator,
            "processing_class": ViTImageProcessor(),  # of which tensors need none
        }
        if world is not None:
            return ImageStageTrainer(model, world=world, **shared)
        if run.method == "local":
            return LocalImageTrainer(model, **shared)
        trainer = _EndToEndTrainer(model, **shared)
        trainer.groups = clip_groups(model, run.parts_at)
        return trainer

    def load_stage(self, run: MethodRun, plan: StagePlan) -> PreTrainedModel:
        model = _load(run.checkpoint)
        keep_image_stage(model, find_stack(model), plan)
        return model

    def make_stage(self, run: MethodRun, plan: StagePlan, model: PreTrainedModel) -> nn.Module:
        return _StageModule(model, plan, run)

    def make_batches(self, run: MethodRun) -> list[tuple[Mapping[str, torch.Tensor], torch.Tensor]]:
        images = _images(run, _load(run.checkpoint))
        size = run.settings.batch_size
        parts = zip(images.pixels.split(size), images.labels.split(size), strict=True)
        return [({"pixels": pixels}, labels_B) for pixels, labels_B in parts]

    def message_bytes(self, run: MethodRun, layer: int) -> int:
        model = _load(run.checkpoint)
        values = prod(layer_shapes(model, find_stack(model))[layer]) * run.settings.micro_batch_size
        return values * torch.finfo(torch.float32).bits // 8


def _load(checkpoint: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float32)
    return model


def _image_shape(settings: Any, model: PreTrainedModel) -> tuple[int, int, int]:
    """Channels, height and width of the images."""
    _, channels, height, width = example_image(model.config).shape
    size = settings.image_size
    return (channels, height, width) if size is None else (channels, size, size)


def _images(run: MethodRun, model: PreTrainedModel) -> _RandomImages:
    settings = run.settings
    number, labels = settings.batch_size * run.total_steps, int(model.config.num_labels or 0)
    return _RandomImages(number, _image_shape(settings, model), labels, settings.seed)


class _EndToEndTrainer(ClippedApart, ImageTrainer):
    """The trainer of transformers."""


class _StageModule(nn.Module):
    """A stage's part of the model as torch's schedules call it; the last one returns logits."""

    def __init__(self, model: PreTrainedModel, plan: StagePlan, run: MethodRun) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.autocast = run.settings.dtype == "bfloat16"
        self.num_images = run.settings.batch_size
        self.input = None if plan.is_first else HiddenStateInput(find_stack(model).layers[plan.start])

    def forward(self, input: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Runs the stage on hidden states, the first one on `pixels`, which is `input` there."""
        if self.input is not None:
            self.input.hidden_BTD = input
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if not self.plan.is_last:
                hidden: torch.Tensor = self.model.base_model(pixel_values=pixels).last_hidden_state
                return hidden
            logits_BL: torch.Tensor = self.model(pixel_values=pixels).logits
        return logits_BL

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The micro-batch's share of the batch's mean loss."""
        return F.cross_entropy(output.float(), target, reduction="sum") / self.num_images
