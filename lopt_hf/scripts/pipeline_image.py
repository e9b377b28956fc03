"""`lopt-hf pipeline --task image`: image classifiers in a pipeline of local learners.

Options of data and model are those of `lopt-hf image`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, TrainerState, set_seed
from trl import TrlParser

from lopt_hf.common.settings import check_choice, option
from lopt_hf.common.upstream.trainers import TRAINER_STATE_NAME
from lopt_hf.local.learner import LocalLearner
from lopt_hf.local.stacks import find_stack
from lopt_hf.pipeline.runtime.image.config import ImagePipelineConfig
from lopt_hf.pipeline.runtime.image.costs import measure_image_costs
from lopt_hf.pipeline.runtime.image.stage import check_stage_model
from lopt_hf.pipeline.runtime.image.trainer import ImageStageTrainer
from lopt_hf.pipeline.runtime.launch import PipelineWorld, Rendezvous
from lopt_hf.pipeline.runtime.run import agreed_split, run_stage
from lopt_hf.pipeline.split.balance import balanced_split, format_split
from lopt_hf.scripts.image import METHODS as SCRIPT_METHODS
from lopt_hf.scripts.image import ImageScriptArguments, set_objective
from lopt_hf.scripts.image_models import ImageSourceArguments, make_image_model
from lopt_hf.scripts.image_rows import LabelledImages, load_images
from lopt_hf.scripts.parsing import make_trl_parser
from lopt_hf.trainers.configs import convert_config
from lopt_hf.trainers.image import ImageTrainer, ImageTrainingArguments, check_image_model, crop_size

__all__ = [
    "REFUSED_METHODS",
    "ImagePipelineArguments",
    "check_images",
    "check_objective",
    "make_parser",
    "run_image_stage",
]

METHODS = ("local", "readout")
_IN_ONE_PROCESS = "train in one process with `lopt-hf image`"
REFUSED_METHODS = {
    "e2e": "end-to-end training sends gradients back from stage to stage within a step, and here no stage waits for "
    f"one; let them come late with `--gradient delayed`, or {_IN_ONE_PROCESS}",
    "freeze": f"its early stages would learn nothing; {_IN_ONE_PROCESS}",
    "reach": "no gradient of a step passes from one stage to another in that step; let all come late with "
    f"`--gradient delayed`, or {_IN_ONE_PROCESS}",
    "repl": f"a surrogate is made of the layers beside it, which may be of another stage; {_IN_ONE_PROCESS}",
    "mlaan": "its windows and moving averages follow layers of other stages; choose 'local' or 'readout', or "
    f"{_IN_ONE_PROCESS}",
}


@dataclass
class ImagePipelineArguments(ImageScriptArguments):
    """Which images to train on, by which method, and how `lopt-hf pipeline` starts the stages on this host.

    Parameters:
        method: What early blocks learn from where `gradient` is `"local"` or `"local_and_delayed"`: `"local"` a
            classifier of each one's own; `"readout"` a frozen copy of the model's own. Naming one makes `"local"` the
            default of `gradient`.
        task: `"image"`.
        devices: Ids of the accelerators to use.
    """

    method: str = option(
        "local",
        "With gradient local or both: 'local' (a classifier of each early block's own) or 'readout' (the model's own "
        "norm and classifier, frozen). Naming it sets gradient to local by default.",
        METHODS,
    )
    task: str = option("image", "'image' for image classifiers, 'sft' for language models.", ("sft", "image"))
    devices: str | None = option(None, "Ids of the accelerators of this host to use, such as 0,1. Default: all.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("method", self.method, METHODS)


def make_parser(description: str, method: str = "") -> TrlParser:
    """Makes the parser of `lopt-hf pipeline --task image`: data, training and model arguments, and `--config`.

    Args:
        description: What the command is for.
        method: The method that was asked for; empty if none was.
    """
    classes = ImagePipelineArguments, ImagePipelineConfig, ImageSourceArguments
    parser = make_trl_parser("pipeline", description, *classes)
    if method in METHODS:
        parser.set_defaults(local_objective=SCRIPT_METHODS[method])
    return parser


def check_objective(method: str, objective: str, gradient: str) -> None:
    """Refuses a method or local objective that is asked for where the other, or the task's gradient, takes its place.

    Args:
        method: What the command line or its YAML names; empty if neither names one.
        objective: Likewise.
        gradient: Likewise.

    Raises:
        ValueError: If one would not be used.
    """
    if gradient == "delayed":
        if method:
            raise ValueError(
                f"method={method!r} does nothing with gradient='delayed', where early stages learn from the task's "
                "gradient alone; leave it out, or set gradient to 'local' or 'local_and_delayed'."
            )
        return  # an objective is refused with the other training arguments
    own = SCRIPT_METHODS.get(method or "local")
    if own is not None and objective not in ("", "none", own):
        raise ValueError(
            f"local_objective={objective!r} is not that of method={method or 'local'!r}, {own!r}; leave one of them "
            "out."
        )


def check_images(
    script_args: ImagePipelineArguments, args: ImagePipelineConfig, model_args: ImageSourceArguments
) -> None:
    """Reads what the stages will read: here an error in it is one line.

    Raises:
        ValueError: If images, model and options do not fit each other.
        OSError: If data or model cannot be found.
    """
    _set_objective(script_args, args)
    images = load_images(script_args, args.seed)
    model, _ = make_image_model(model_args, images.names)
    check_image_model(model)
    check_stage_model(model, find_stack(model))
    LocalLearner(model, args, run=args.run_facts)  # finds out whether cut and objective fit the model
    images.check(shows_progress=not args.disable_tqdm)


def run_image_stage(
    script_args: ImagePipelineArguments,
    args: ImagePipelineConfig,
    model_args: ImageSourceArguments,
    rendezvous: Rendezvous,
) -> None:
    """Trains one stage to the end; the process that reports then measures the saved model.

    Args:
        script_args: Which images.
        args: Training arguments.
        model_args: Which model.
        rendezvous: This process's place among the launched ones.

    Raises:
        ValueError: If the processes were given different arguments, or another number of them was launched.
        PipelineError: If this stage or another fails.
    """
    _set_objective(script_args, args)
    load = cache(lambda: load_images(script_args, args.seed))
    if run_stage(args, model_args, rendezvous, load, _make_trainer) and load().evaluated is not None:
        _measure(args, load())


def _set_objective(script_args: ImagePipelineArguments, args: ImagePipelineConfig) -> None:
    if args.gradient != "delayed":
        set_objective(script_args.method, args)


def _make_trainer(
    args: ImagePipelineConfig,
    model_args: ImageSourceArguments,
    world: PipelineWorld,
    load: Callable[[], LabelledImages],
) -> ImageStageTrainer:
    images = load()
    set_seed(args.seed)  # what the weights are drawn from
    model, processor = make_image_model(model_args, images.names, keeps_classifier=args.local_objective == "readout")
    if args.split == "auto" and args.split_at is None:
        args.split_at = agreed_split(args, world, partial(_find_split, model, processor, args))
    trainer = ImageStageTrainer(
        model,
        args,
        world=world,
        train_dataset=images.train,
        processing_class=processor,
        columns=images.columns,
    )
    if world.rank == 0:
        print("\n".join(plan.describe("classifier") for plan in trainer.plans), flush=True)
    return trainer


def _find_split(model: PreTrainedModel, processor: Any, args: ImagePipelineConfig) -> list[int]:
    costs = measure_image_costs(
        model,
        args.per_device_train_batch_size,
        args.local_objective,
        crop_size(processor),
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        device=args.device,
        accumulation_steps=args.gradient_accumulation_steps,
    )
    costs = costs.with_gradient(args.gradient, args.gradient_recompute, args.schedule.cycle)
    split = balanced_split(costs, args.num_blocks)
    print(format_split(costs, split), flush=True)
    return split


def _measure(args: ImagePipelineConfig, images: LabelledImages) -> None:
    """Measures the accuracy of the saved model, prints it, and adds it to what was logged."""
    folder = str(args.output_dir)
    trainer = ImageTrainer(
        AutoModelForImageClassification.from_pretrained(folder),
        convert_config(args, ImageTrainingArguments),
        eval_dataset=images.evaluated,
        processing_class=AutoImageProcessor.from_pretrained(folder),
        columns=images.columns,
    )
    path = os.path.join(folder, TRAINER_STATE_NAME)
    trainer.state = TrainerState.load_from_json(path)  # so that what is measured is logged at the run's last step
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.state.save_to_json(path)
    number = len(images.evaluated or ())
    print(f"Accuracy {accuracy:.4f} ({round(accuracy * number):,} of {number:,} images)", flush=True)
