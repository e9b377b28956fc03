"""Local learning of image classifiers on the trainer of transformers."""

import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from lopt_hf.common.arithmetic import fit_to_machine
from lopt_hf.common.settings import option
from lopt_hf.common.training_numbers import check_training_numbers
from lopt_hf.common.upstream.torch import BatchNorm
from lopt_hf.data.images import ImageBatches, ImageRows, make_augmentation
from lopt_hf.local.layer_calls import evaluating
from lopt_hf.local.methods.base import Method
from lopt_hf.local.methods.image.method import LocalImageArguments
from lopt_hf.local.methods.image.mlaan import ImageMLAANArguments
from lopt_hf.local.ownership import TRACE_ERRORS
from lopt_hf.local.stacks import example_image, find_image_stack, is_image_classifier
from lopt_hf.trainers.checkpoint import check_same_model, load_weights
from lopt_hf.trainers.configs import LocalTrainingArguments, convert_config, local_config
from lopt_hf.trainers.mixin import LocalLearningMixin
from lopt_hf.trainers.resume_state import STATE_FILE, ResumeState

__all__ = [
    "ImageTrainer",
    "ImageTrainingArguments",
    "LocalImageConfig",
    "LocalImageTrainer",
    "MLAANImageConfig",
    "MetricsImageTrainer",
    "check_image_model",
    "crop_size",
]

logger = logging.getLogger(__name__)

# Orders of rows that follow from their numbers of tokens
_BY_LENGTH = ("group_by_length", "batch_rebalance")
# What `evaluate` measures of a model with our `compute_metrics`, after the data set's name where there are several
_METRICS = ("loss", "accuracy")


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """Arguments of a trainer of image classifiers: those of `TrainingArguments`, and the augmentation.

    Parameters:
        augmentation: The random change of each training image: `"crop-flip"`, `"resized-crop"` or `"none"`, see
            `lopt_hf.data.images.make_augmentation`.
    """

    augmentation: str = option(
        "crop-flip",
        "Random change of each training image: 'crop-flip' (as for CIFAR), 'resized-crop' (as for ImageNet), 'none'.",
        ["crop-flip", "resized-crop", "none"],
    )
    remove_unused_columns: bool = option(False, "Remove columns that the model does not know; images need it off.")

    def __post_init__(self) -> None:
        check_training_numbers(self)
        fit_to_machine(self)
        super().__post_init__()


@dataclass
class _LocalImageTrainingArguments(LocalTrainingArguments):
    """Joins a method's arguments to `ImageTrainingArguments`; local losses know no smoothed labels."""

    _task: ClassVar[str] = "image classification"

    def __post_init__(self) -> None:
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} does not work with local learning; leave it "
                "out."
            )
        super().__post_init__()


@dataclass
class LocalImageConfig(_LocalImageTrainingArguments, LocalImageArguments, ImageTrainingArguments):
    """Configuration of [`LocalImageTrainer`]: every argument of [`~transformers.TrainingArguments`] and ours."""


@dataclass
class MLAANImageConfig(_LocalImageTrainingArguments, ImageMLAANArguments, ImageTrainingArguments):
    """Configuration of [`LocalImageTrainer`] for MLAAN: every argument of `TrainingArguments` and those of MLAAN."""


def image_arguments(args: TrainingArguments, takes_images: bool) -> ImageTrainingArguments:
    """Training arguments with those of images, from a plain `TrainingArguments` too.

    Args:
        args: What a user passed.
        takes_images: Whether the batches are made from images, which a plain one has removed by default.

    Raises:
        ValueError: If the images are to be removed, or put in an order that they do not have.
    """
    if not isinstance(args, ImageTrainingArguments):
        args = convert_config(args, ImageTrainingArguments)
        args.remove_unused_columns = args.remove_unused_columns and not takes_images
    elif takes_images and args.remove_unused_columns:
        raise ValueError("remove_unused_columns=True would remove the images, a column of no model; leave it out.")
    if takes_images and args.train_sampling_strategy in _BY_LENGTH:
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} goes by the rows' numbers of tokens, which "
            "images do not have; set it to 'random' or 'sequential'."
        )
    return args


def check_checkpointing(model: nn.Module, args: TrainingArguments) -> None:
    """Raises `ValueError` if layers are to run again in the backward, and the model knows no such thing."""
    if args.activation_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
        raise ValueError(
            "activation_checkpointing=True (gradient_checkpointing is its older name) is nothing that "
            f"{type(model).__name__} knows; leave it out."
        )


def check_best_metric(args: TrainingArguments, eval_dataset: Any) -> None:
    """Raises if models are compared by what is not measured; transformers looks for it after the first evaluation.

    Args:
        args: Training arguments.
        eval_dataset: What is measured on, several data sets by name.

    Raises:
        ValueError: With what is measured.
    """
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no":
        return
    names = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    known = [f"{name}{measured}" for name in names for measured in _METRICS]
    if metric.removeprefix("eval_") not in known:
        raise ValueError(f"metric_for_best_model={metric!r} is not measured of a model; use {', '.join(known)}.")


def smallest_batch(args: TrainingArguments, number: int) -> int:
    """How many images the smallest batch of a process has.

    Args:
        args: Training arguments.
        number: How many images there are.
    """
    size = args.per_device_train_batch_size
    batches, rest = divmod(number, size)
    num_steps = args.max_steps * args.gradient_accumulation_steps
    is_left_out = args.dataloader_drop_last or args.world_size > 1  # accelerate fills the last batches of several
    return size if not rest or is_left_out or 0 < num_steps <= batches else rest


def check_batch_norms(
    model: PreTrainedModel, args: TrainingArguments, number: int, size: tuple[int, int] | None
) -> None:
    """Raises if a batch norm would be given one value of each channel, of which torch makes no deviation.

    Args:
        model: The model.
        args: Training arguments.
        number: How many images it is trained on.
        size: Their height and width; `None`: those of the model's config.

    Raises:
        ValueError: With the fix.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    if not norms or smallest_batch(args, number) > 1 or is_deepspeed_zero3_enabled():  # no weight is whole there
        return
    found: list[int] = []
    hooks = [norm.register_forward_pre_hook(lambda _, given: found.append(given[0][0, 0].numel())) for norm in norms]
    try:
        with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]):
            pixels = example_image(model.config, next(model.parameters()).device).to(model.dtype)
            model(pixel_values=pixels if size is None else pixels.new_zeros(*pixels.shape[:2], *size))
    except TRACE_ERRORS:  # of an architecture that wants more than pixels
        return
    finally:
        for hook in hooks:
            hook.remove()
    if 1 not in found:
        return
    batch = args.per_device_train_batch_size
    what, fix = f"{number} images, leaves one for the last batch", "another, or dataloader_drop_last to True"
    if batch == 1:
        what, fix = "one image", "2 or more"
    raise ValueError(
        f"per_device_train_batch_size={batch}, of {what}: a batch norm of {type(model).__name__} would have one value "
        f"of each channel, whose deviation is none; set it to {fix}, or train on larger images."
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of images whose likeliest class is their label."""
    logits: Any = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def image_processor_for(model: PreTrainedModel) -> Any:
    """The image processor of a model's checkpoint; where it has none 0.5 is mean and deviation."""
    try:
        return AutoImageProcessor.from_pretrained(model.config.name_or_path)
    except (OSError, ValueError):  # none is there
        if model.config.name_or_path:
            logger.warning(
                "%s has no image processor that can be loaded: images are normalised with 0.5 as mean and deviation. "
                "Pass the checkpoint's as processing_class if it was trained with another.",
                model.config.name_or_path,
            )
        size: Any = vars(model.config).get("image_size")
        if size is None:
            return ViTImageProcessor(do_resize=False)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return ViTImageProcessor(size={"height": height, "width": width})


@torch.no_grad()
def counts_images(model: PreTrainedModel) -> bool:
    """Whether a model's loss is a sum over the images divided by `num_items_in_batch`.

    The parent takes that for granted of each forward that takes keyword arguments. Some (ResNet, RegNet, BEiT, Swin
    V2) pass over the number, and give the mean of the micro-batch: it has to be divided by the accumulation steps.
    """
    if is_deepspeed_zero3_enabled():  # no weight is whole here
        return True
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            pixels = example_image(model.config, device).to(model.dtype)
            labels = model(pixel_values=pixels).logits.argmin(-1)  # whose loss is not 0
            of_one = model(pixel_values=pixels, labels=labels, num_items_in_batch=1).loss
            of_two = model(pixel_values=pixels, labels=labels, num_items_in_batch=2).loss
    except TRACE_ERRORS:  # of an architecture that wants more than pixels
        return True
    return bool(of_two < 0.75 * of_one)


def crop_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of the images that a processor makes; `None` where it leaves them as they are."""
    if not processor.do_resize and not getattr(processor, "do_center_crop", None):
        return None
    size: Any = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    side = size.get("shortest_edge")
    return (side, side) if side else (size["height"], size["width"])


class _SayEpoch(TrainerCallback):
    """Tells the training images which epoch begins."""

    def __init__(self, rows: ImageRows) -> None:
        self._rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rows.set_epoch(int(state.epoch or 0))


class ImageTrainer(Trainer):
    """The trainer of transformers, which takes data sets of images and labels as they are, and measures accuracy.

    Args:
        model: An image classifier.
        args: Training arguments.
        train_dataset: A `datasets.Dataset` with a column `image` and one `label`, or an `ImageRows`.
        eval_dataset: The same, or several by name; `evaluate` and `predict` take the same too.
        processing_class: The image processor. Default: that of the model's checkpoint.
        columns: The columns of images and labels, where they are not called as usual.
        **kwargs: Further arguments of `Trainer`.

    Raises:
        RowError: If a row cannot be trained on; names it.
        ValueError: If a column is missing, or if an option does not go with the model or the images.
    """

    args: Any
    _tag_names: ClassVar[list[str]] = ["image-classification"]

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Dataset | ImageRows | None = None,
        eval_dataset: Dataset | ImageRows | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        columns: tuple[str, str] | tuple[None, None] = (None, None),
        **kwargs: Any,
    ) -> None:
        processor = image_processor_for(model) if processing_class is None else processing_class
        given = {"data_collator": ImageBatches(processor), "compute_metrics": accuracy, **kwargs}
        self._takes_images = isinstance(given["data_collator"], ImageBatches)
        args = image_arguments(args, self._takes_images)
        check_checkpointing(model, args)
        if given["compute_metrics"] is accuracy:
            check_best_metric(args, eval_dataset)
        self._columns = columns
        self._classes = int(model.config.num_labels or 0)
        if train_dataset is not None:
            augmentation = make_augmentation(args.augmentation, crop_size(processor))
            train_dataset = self._rows_of(train_dataset, augmentation, args.seed)
        if isinstance(train_dataset, ImageRows):
            check_batch_norms(model, args, len(train_dataset), crop_size(processor))
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._rows_of(rows) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._rows_of(eval_dataset)
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processor, **given
        )
        if self.model_accepts_loss_kwargs:
            self.model_accepts_loss_kwargs = counts_images(model)
        if isinstance(self.train_dataset, ImageRows):
            self.add_callback(_SayEpoch(self.train_dataset))

    def _rows_of(self, dataset: Any, augmentation: Any = None, seed: int = 0) -> Any:
        """What the collator takes: a data set's rows as tensors; with a collator of the user's own what is given."""
        if isinstance(dataset, ImageRows) or not self._takes_images:
            return dataset
        return ImageRows(dataset, self._classes, augmentation, seed, *self._columns)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the parent's, of a data set as it is."""
        given = eval_dataset is not None and not isinstance(eval_dataset, str)
        return super().get_eval_dataloader(self._rows_of(eval_dataset) if given else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As the parent's, of a data set as it is."""
        return super().get_test_dataloader(self._rows_of(test_dataset))

    def check_checkpoint(self, checkpoint: str) -> Any:
        """Checks that a checkpoint is of the trainer of transformers, and of a model like this run's.

        Raises:
            ValueError: If it is not; the message names what differs.
        """
        if (Path(checkpoint) / STATE_FILE).is_file():
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is a checkpoint of local learning, and this run is not; to "
                "start from its weights, pass the folder as `model`."
            )
        check_same_model(cast(PreTrainedModel, self.model), checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not isinstance(self, LocalLearningMixin):  # whose `train` has checked it
            self.check_checkpoint(resume_from_checkpoint)
        given: Any = self.model if model is None else model
        load_weights(given, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        of_run: Any = self.model
        load_weights(of_run, str(self.state.best_model_checkpoint))

    def create_model_card(  # type: ignore[override]  # as TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the card of transformers."""
        all_tags = [*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])]
        super().create_model_card(
            model_name=model_name, dataset=dataset_name, tags=all_tags, tasks="image-classification"
        )


class MetricsImageTrainer(ImageTrainer):
    """What `LocalLearningMixin` expects of a trainer and TRL's have: metrics that are averaged when it logs."""

    aux_loss_enabled = False
    router_aux_loss_coef = 0.0
    _tag_names: ClassVar[list[str]] = ["image-classification", "local-learning"]
    _total_train_tokens = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the metrics since the last log."""
        model: Any = self.model
        metrics = self._metrics["train" if model.training else "eval"]
        means = {name: sum(values) / len(values) for name, values in metrics.items() if values}
        super().log({**logs, **means}, start_time)
        metrics.clear()


class LocalImageTrainer(LocalLearningMixin, MetricsImageTrainer):
    """Trainer of image classifiers by local learning: ViT, DeiT, DINOv2, Swin and ResNet.

    The layers are cut into blocks. The task loss trains the last block, or as many as `task_reach` says; early ones
    learn the classes through a classifier of their own (`LocalImageConfig`), or by MLAAN (`MLAANImageConfig`). The
    only change with respect to [`~transformers.Trainer`] is what local learning adds, and the saved model is a stock
    checkpoint.

    Args:
        model: A `transformers` image classifier.
        args: Training arguments. Default: `LocalImageConfig` with the output folder `<model>-local`.
        *image_args: The remaining positional arguments of `ImageTrainer`.
        method: The method. Default: the one that the arguments are of.
        **image_kwargs: The keyword arguments of `ImageTrainer`.

    Example:

    ```python
    from datasets import load_dataset
    from transformers import AutoModelForImageClassification
    from lopt_hf import LocalImageTrainer, MLAANImageConfig

    model = AutoModelForImageClassification.from_pretrained(
        "google/vit-base-patch16-224-in21k", num_labels=10
    )
    trainer = LocalImageTrainer(
        model, MLAANImageConfig("out", num_blocks=4, window=2), train_dataset=load_dataset("cifar10", split="train")
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _name = "Local image classification"

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *image_args: Any,
        method: Method | None = None,
        **image_kwargs: Any,
    ) -> None:
        check_image_model(model)
        if not isinstance(args, MLAANImageConfig):
            if args is not None:
                collator = image_kwargs.get("data_collator")
                args = image_arguments(args, takes_images=collator is None or isinstance(collator, ImageBatches))
            args = local_config(model, args, LocalImageConfig, "local")
        super().__init__(model, args, *image_args, method=method, **image_kwargs)
        if self.args.n_gpu > 1:  # TRL's trainers say so themselves
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs, among which transformers shares batches by copies of the "
                "model (`nn.DataParallel`), which local learning does not know; start one process per GPU with "
                "`accelerate launch`, or let CUDA_VISIBLE_DEVICES name one of them."
            )

    def check_checkpoint(self, checkpoint: str) -> ResumeState:
        """Reads what this trainer needs to go on from a checkpoint.

        Raises:
            ValueError: As the parent's, and if the checkpoint's model is built otherwise than this run's.
        """
        state = super().check_checkpoint(checkpoint)
        check_same_model(self.model, checkpoint)
        return state


def check_image_model(model: nn.Module) -> None:
    """Raises `ValueError` if a model is no image classifier whose layers can be cut."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model={type(model).__name__} is no image classifier of transformers; adapters are not supported here."
        )
    if not is_image_classifier(model):
        raise ValueError(
            f"model={type(model).__name__} takes no pixels; load an image classifier with "
            "`AutoModelForImageClassification`."
        )
    find_image_stack(model)
