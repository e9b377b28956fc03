"""Training of image classifiers: end-to-end, by local learning, or with layers replaced.

```bash
lopt-hf image --method mlaan --train_file train.parquet --eval_file test.parquet --output_dir out
lopt-hf image --method local --architecture resnet20 --train_file train.parquet --output_dir out
lopt-hf image --method reach --task_reach '[1,1,1,4]' --num_blocks 4 --train_file train.parquet --output_dir out
lopt-hf image --method e2e --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name cifar10 \\
    --output_dir out
lopt-hf image --method repl --operator head+mlp --replace_every 4 --train_file train.parquet --output_dir out
lopt-hf image --method mlaan --help                                            # the options of that method
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import TrlParser

from lopt_hf.common.settings import check_at_least, check_choice, option
from lopt_hf.data.images import ImageRows, check_labels, class_names, find_columns
from lopt_hf.scripts.image_models import ARCHITECTURES, make_image_model
from lopt_hf.scripts.image_replacement import ReplacementArguments, replace_layers
from lopt_hf.scripts.parsing import chosen_method, make_trl_parser
from lopt_hf.scripts.training import DataArguments, load_checked, load_rows, run_training, subsample
from lopt_hf.trainers.image import (
    ImageTrainer,
    ImageTrainingArguments,
    LocalImageConfig,
    LocalImageTrainer,
    MLAANImageConfig,
)

__all__ = ["METHODS", "ImageModelArguments", "ImageScriptArguments", "main", "make_parser", "make_trainer"]

# The local objective that a method stands for; of those that have none of these options `None`
METHODS: dict[str, str | None] = {
    "e2e": None,
    "freeze": "none",
    "reach": "none",
    "local": "classifier",
    "readout": "readout",
    "mlaan": None,
    "repl": None,
}
# Methods of the trainer of transformers
END_TO_END = ("e2e", "repl")
# Ours: so many images are read once before training, so that a broken one is named then and not in the last epoch
CHECKED_IMAGES = 50_000


@dataclass
class ImageScriptArguments(DataArguments):
    """Which images to train on, and by which method.

    Parameters:
        method: `"e2e"`: the trainer of transformers; `"freeze"`: the last block only; `"reach"`: more blocks at some
            steps (`task_reach`); `"local"`: each block through a classifier of its own; `"readout"`: through the
            model's own, frozen; `"mlaan"`, with options of its own; `"repl"`: end-to-end, with layers of a ViT
            replaced by surrogates or removed.
        train_file: A `.parquet`, `.json` or `.jsonl` file, or a folder, in place of `dataset_name`.
        eval_file: The same for the images that accuracy is measured on.
        image_column: The column of images. Default: `image` or `img`.
        label_column: The column of labels. Default: `label` or `labels`.
    """

    method: str = option(
        "local",
        "'e2e' (the trainer of transformers), 'freeze' (the last block only), 'reach' (more blocks at some steps: "
        "task_reach), 'local' (a classifier for each block), 'readout' (the model's own, frozen), 'mlaan' "
        "(`--method mlaan --help` shows its options), or 'repl' (layers of a ViT replaced, end-to-end).",
        list(METHODS),
    )
    dataset_name: str | None = option(None, "Hub id, or a local .parquet, .json or .jsonl file.")
    train_file: str | None = option(None, "Local file or folder of images and labels, in place of dataset_name.")
    eval_file: str | None = option(
        None,
        "The same, for what accuracy is measured on. Default: that split of dataset_name.",
    )
    image_column: str | None = option(None, "Column of images. Default: image or img.")
    label_column: str | None = option(None, "Column of labels, numbers from 0 on. Default: label or labels.")

    def __post_init__(self) -> None:
        check_choice("method", self.method, list(METHODS))
        if self.train_file is not None:
            if self.dataset_name is not None:
                raise ValueError(
                    f"train_file={self.train_file!r} and dataset_name={self.dataset_name!r} both name the images to "
                    "train on; leave one of them out."
                )
            self.dataset_name = self.train_file
        if self.dataset_streaming:
            raise ValueError("dataset_streaming=True does not work with images, which are looked up; leave it out.")
        if self.dataset_fallback is not None:
            raise ValueError(f"dataset_fallback={self.dataset_fallback!r}: no images are generated; leave it out.")


@dataclass
class ImageModelArguments(ReplacementArguments):
    """Which model to train; what `method="repl"` replaces is among the arguments.

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
        super().__post_init__()
        check_choice("architecture", self.architecture, list(ARCHITECTURES))
        check_at_least("image_size", self.image_size, 8)
        if self.model_name_or_path is None and self.model_revision != "main":
            raise ValueError(
                f"model_revision={self.model_revision!r} does nothing without model_name_or_path; leave it out."
            )
        if self.model_name_or_path is not None and self.architecture != "vit":
            raise ValueError(
                f"architecture={self.architecture!r} does nothing with model_name_or_path="
                f"{self.model_name_or_path!r}, which has one; leave one of them out."
            )
        if self.model_name_or_path is not None and self.image_size is not None:
            raise ValueError(
                f"image_size={self.image_size} does nothing with model_name_or_path={self.model_name_or_path!r}, "
                "whose image processor has one; leave it out."
            )


def make_parser(method: str = "local") -> TrlParser:
    """Makes the parser of this command: script, training and model arguments, and `--config file.yaml`.

    Args:
        method: The method whose training arguments it takes; any that has none of its own is a local one.
    """
    config_class: type = ImageTrainingArguments if method in END_TO_END else LocalImageConfig
    if method == "mlaan":
        config_class = MLAANImageConfig
    return make_trl_parser("image", __doc__, ImageScriptArguments, config_class, ImageModelArguments)


def make_trainer(script_args: ImageScriptArguments, args: Any, model_args: ImageModelArguments) -> ImageTrainer:
    """Builds the trainer of `method` from parsed arguments.

    Raises:
        ValueError: If an option does not fit the method, the model or the images.
    """
    if script_args.method != "repl":
        model_args.check_unused(script_args.method)
    _set_objective(script_args.method, args)
    whole = cast(Dataset, _load(script_args, "train", args.seed))
    evaluated = _load(script_args, "eval", args.seed)
    columns = find_columns(whole, script_args.image_column, script_args.label_column)
    names = class_names(whole, columns[1])  # a part may lack the highest label
    check_labels(whole, columns[1], len(names))
    train = cast(Dataset, subsample(whole, script_args.dataset_max_samples, args.seed))
    set_seed(args.seed)  # what the weights are drawn from
    model, processor = make_image_model(model_args, names)
    if script_args.method == "repl":
        model = replace_layers(model, model_args)
    trainer_class = ImageTrainer if script_args.method in END_TO_END else LocalImageTrainer
    trainer = trainer_class(model, args, train, evaluated, processor, columns=columns)
    if isinstance(trainer.train_dataset, ImageRows) and script_args.dataset_max_samples is not None:
        numbers = Dataset.from_dict({"row": list(range(1, len(whole) + 1))})
        trainer.train_dataset.numbers = subsample(numbers, script_args.dataset_max_samples, args.seed)["row"][:]
    for images in (trainer.train_dataset, trainer.eval_dataset):
        if isinstance(images, ImageRows) and len(images) <= CHECKED_IMAGES:
            images.check_images()
    if evaluated is not None:
        trainer.add_callback(_MeasureAtEnd(trainer))
    return trainer


def _set_objective(method: str, args: Any) -> None:
    """Sets the local objective that a method stands for, and checks the arguments again with it."""
    objective = METHODS[method]
    if objective is None:
        return
    default = LocalImageConfig.__dataclass_fields__["local_objective"].default
    if args.local_objective not in (objective, default):
        raise ValueError(
            f"local_objective={args.local_objective!r} is not that of method={method!r}, {objective!r}; leave one of "
            "them out."
        )
    args.local_objective = objective
    args.check()
    args.check_run(args.run_facts)
    if method == "freeze" and args.schedule.highest > 1:
        raise ValueError(
            f"task_reach={args.task_reach} trains early blocks, which method='freeze' does not; leave it out, or set "
            "method to 'reach'."
        )
    if method == "reach" and args.schedule.highest == 1:
        raise ValueError(
            f"task_reach={args.task_reach} is freezing the early blocks; with method='reach' give a cycle such as "
            f"[1,1,1,{args.num_blocks}]."
        )


def _load(script_args: ImageScriptArguments, part: str, seed: int) -> Any:
    if part == "train":
        return load_checked(_rows, script_args, script_args.dataset_train_split, seed)
    if script_args.eval_file is not None:
        name, script_args.dataset_name = script_args.dataset_name, script_args.eval_file
        try:
            return load_checked(_rows, script_args, "train", seed)  # of a file the only split
        finally:
            script_args.dataset_name = name
    if script_args.train_file is not None:
        return None
    return load_checked(_rows, script_args, script_args.dataset_test_split, seed)


def _rows(script_args: ImageScriptArguments, split: str, seed: int) -> Any:
    return load_rows(script_args, split, seed, {})


class _MeasureAtEnd(TrainerCallback):
    """Measures accuracy when training ends, and prints it."""

    def __init__(self, trainer: ImageTrainer) -> None:
        self._trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        measured = self._trainer.evaluate()
        rows = cast(ImageRows, self._trainer.eval_dataset)
        right = round(measured["eval_accuracy"] * len(rows))
        self._trainer.accelerator.print(
            f"Accuracy {measured['eval_accuracy']:.4f} ({right:,} of {len(rows):,} images)", flush=True
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and saves a model, and, if asked to, pushes it.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    run_training(make_parser(chosen_method(argv)), argv, make_trainer)


if __name__ == "__main__":
    main()
