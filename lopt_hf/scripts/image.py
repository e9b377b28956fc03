"""Training of image classifiers: end-to-end, by local learning, or with layers replaced.

```bash
lopt-hf image --method mlaan --train_file train.parquet --eval_file test.parquet --output_dir out/mlaan
lopt-hf image --method local --architecture resnet20 --train_file train.parquet --output_dir out/local
lopt-hf image --method reach --task_reach 4 --num_blocks 4 --train_file train.parquet --output_dir out/reach
lopt-hf image --method e2e --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name cifar10 \\
    --output_dir out/e2e
lopt-hf image --method repl --operator head+mlp --replace_every 4 --train_file train.parquet --output_dir out/repl
lopt-hf image --method repl --architecture resnet20 --train_file train.parquet --output_dir out/resnet
lopt-hf image --method mlaan --help                                            # the options of that method
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import TrainerCallback, set_seed
from trl import TrlParser

from lopt_hf.common.settings import check_choice, option
from lopt_hf.data.images import ImageRows
from lopt_hf.scripts.image_models import ImageSourceArguments, make_image_model
from lopt_hf.scripts.image_replacement import DEFAULTS, REMOVAL, ReplacementArguments, replace_layers
from lopt_hf.scripts.image_rows import load_images
from lopt_hf.scripts.parsing import chosen_method, make_trl_parser
from lopt_hf.scripts.training import DataArguments, run_training
from lopt_hf.trainers.image import (
    ImageTrainer,
    ImageTrainingArguments,
    LocalImageConfig,
    LocalImageTrainer,
    MLAANImageConfig,
)

__all__ = [
    "METHODS",
    "ImageModelArguments",
    "ImageScriptArguments",
    "main",
    "make_parser",
    "make_trainer",
    "set_objective",
]

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


@dataclass
class ImageScriptArguments(DataArguments):
    """Which images to train on, and by which method.

    Parameters:
        method: `"e2e"`: the trainer of transformers; `"freeze"`: the last block only; `"reach"`: more blocks at some
            steps (`task_reach`); `"local"`: each block through a classifier of its own; `"readout"`: through the
            model's own, frozen; `"mlaan"`, with options of its own; `"repl"`: end-to-end, with layers of a ViT or
            ResNet replaced by surrogates or removed.
        train_file: A `.parquet`, `.json` or `.jsonl` file, or a folder, in place of `dataset_name`.
        eval_file: The same for the images that accuracy is measured on.
        image_column: The column of images. Default: `image` or `img`.
        label_column: The column of labels. Default: `label` or `labels`.
    """

    method: str = option(
        "local",
        "'e2e' (the trainer of transformers), 'freeze' (the last block only), 'reach' (more blocks at some steps: "
        "task_reach), 'local' (a classifier for each block), 'readout' (the model's own, frozen), 'mlaan' "
        "(`--method mlaan --help` shows its options), or 'repl' (layers replaced, end-to-end).",
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
class ImageModelArguments(ImageSourceArguments, ReplacementArguments):
    """Which model to train, and what `method="repl"` replaces."""

    def __post_init__(self) -> None:
        ImageSourceArguments.__post_init__(self)
        ReplacementArguments.__post_init__(self)


def make_parser(method: str = "local") -> TrlParser:
    """Makes the parser of this command: script, training and model arguments, and `--config file.yaml`.

    Args:
        method: The method whose training arguments it takes; any that has none of its own is a local one.
    """
    config_class: type = ImageTrainingArguments if method in END_TO_END else LocalImageConfig
    if method == "mlaan":
        config_class = MLAANImageConfig
    parser = make_trl_parser("image", __doc__, ImageScriptArguments, config_class, ImageModelArguments)
    objective = METHODS.get(method)
    if objective is not None:
        parser.set_defaults(local_objective=objective)  # so that another one is known to be asked for
    return parser


def make_trainer(script_args: ImageScriptArguments, args: Any, model_args: ImageModelArguments) -> ImageTrainer:
    """Builds the trainer of `method` from parsed arguments.

    Raises:
        ValueError: If an option does not fit the method, the model or the images.
    """
    if script_args.method != "repl":
        model_args.check_unused(script_args.method)
    set_objective(script_args.method, args, default=METHODS[script_args.method])
    images = load_images(script_args, args.seed)
    if images.evaluated is not None and args.prediction_loss_only:
        raise ValueError("prediction_loss_only=True leaves nothing to measure accuracy by; leave it out.")
    set_seed(args.seed)  # what the weights are drawn from
    is_frozen = isinstance(args, MLAANImageConfig) and args.readout == "frozen"
    keeps_classifier = is_frozen or METHODS[script_args.method] == "readout"
    model, processor = make_image_model(model_args, images.names, keeps_classifier)
    if script_args.method == "repl":
        model = replace_layers(model, model_args)
        if model_args.operator == REMOVAL:  # a stock model's config does not tell which layers are gone, nor its shape
            model.config.replace_every = model_args.replace_every or DEFAULTS[model.config.model_type][1]
    trainer_class = ImageTrainer if script_args.method in END_TO_END else LocalImageTrainer
    trainer = trainer_class(model, args, images.train, images.evaluated, processor, columns=images.columns)
    shows_progress = args.local_process_index == 0 and not args.disable_tqdm
    images.check_rows(trainer.train_dataset, is_training=True, shows_progress=shows_progress)
    images.check_rows(trainer.eval_dataset, is_training=False, shows_progress=shows_progress)
    if images.evaluated is not None:
        trainer.add_callback(_MeasureAtEnd(trainer))
    return trainer


def set_objective(method: str, args: Any, default: str | None = "classifier") -> None:
    """Sets the local objective that a method stands for, and checks the arguments again with it.

    Args:
        method: One of `METHODS`.
        args: Training arguments.
        default: The local objective that they have where none is asked for.

    Raises:
        ValueError: If they do not fit the method.
    """
    objective = METHODS[method]
    if objective is None:
        return
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
