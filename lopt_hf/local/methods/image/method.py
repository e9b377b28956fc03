"""Local learning of image classifiers with one objective on each early block's output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lopt_hf.common.settings import check_left_out, option
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.methods.base import Learner, Method
from lopt_hf.local.methods.image.heads import ModelTail, has_one_shape, layer_shapes, make_classifier
from lopt_hf.local.methods.image.objectives import ClassifierObjective, FrozenTailObjective
from lopt_hf.local.methods.lopt import LoPT, LoPTArguments
from lopt_hf.local.objectives import LocalObjective, ReconstructionObjective
from lopt_hf.local.run_facts import RunFacts

__all__ = ["ImageLocal", "ImageMethod", "LocalImageArguments", "check_engine", "check_image_options"]

# Options that mean nothing for images, each with the only value that it may have
_LANGUAGE_ONLY = {"tied_embeddings": "untie", "reconstruction_mask": "attention", "train_vision": False}


def check_image_options(settings: Any) -> None:
    """Raises `ValueError` if an option that means nothing for images is set."""
    for name, default in _LANGUAGE_ONLY.items():
        value = getattr(settings, name, default)
        if value != default:
            raise ValueError(f"{name}={value!r} does nothing for an image classifier; leave it out.")


def check_engine(run: RunFacts) -> None:
    """Raises `ValueError` under an engine that shards the model."""
    if run.engine is not None:
        raise ValueError(
            f"Local learning of image classifiers does not work under {run.engine}; train in one process or with DDP."
        )


class ImageMethod(Method):
    """What a method does otherwise with image classifiers; comes before the method among the base classes."""

    def separates_embeddings(self, learner: Learner) -> bool:
        return False  # there is no LM head

    def local_scale(
        self,
        inputs: Mapping[str, Any],
        num_items: torch.Tensor | int | None,
        accumulation_steps: int,
        num_processes: int,
    ) -> float:
        """Weighs each image as the task loss does, however many of the step's images the micro-batch has."""
        if num_items is None:
            return super().local_scale(inputs, num_items, accumulation_steps, num_processes)
        return float(inputs["labels"].shape[0] / num_items * num_processes)


@dataclass
class LocalImageArguments(LoPTArguments):
    """Arguments of local learning of image classifiers; those of `LoPTArguments` are among them.

    Parameters:
        local_objective: What the early blocks learn from. `"classifier"`: the classes, through a classifier of each
            block's own (plain supervised local learning); `"readout"`: the classes, through a frozen copy of the
            model's own norm and classifier; `"reconstruction"`: to keep their input recoverable (LoPT);
            `"none"`: the task loss alone, at the steps at which it reaches them (`task_reach`). Readout and
            reconstruction need layers of one width.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    _default_objective: ClassVar[str] = "classifier"

    local_objective: str = option(
        "classifier",
        "What the early blocks learn from: 'classifier', the classes through one of each block's own; 'readout', "
        "the classes through the model's own norm and classifier, frozen as at the start; 'reconstruction' of their "
        "input; or 'none': the task loss alone, where `task_reach` lets it reach them.",
        ["classifier", "readout", "reconstruction", "none"],
    )

    def make_method(self) -> "ImageLocal":
        return ImageLocal()

    def check(self) -> None:
        super().check()
        check_image_options(self)
        if self.local_objective != "reconstruction":
            check_left_out(
                self,
                ("reconstruction_weight", "reconstruction_bottleneck"),
                f"does nothing with local_objective={self.local_objective!r}; leave it out, or set local_objective to "
                "'reconstruction'.",
            )

    def check_run(self, run: RunFacts) -> None:
        check_engine(run)
        super().check_run(run)


class ImageLocal(ImageMethod, LoPT):
    """Local learning of an image classifier with one objective on each early block's output."""

    def stage_needs(self, settings: Any) -> Literal["part", "readout", "model"]:
        return "model"  # classifiers are made from what the whole model makes of an image

    def make_objective(self, learner: Learner) -> LocalObjective:
        settings: LocalImageArguments = learner.settings
        if self.objective is not None or settings.local_objective == "none":
            return super().make_objective(learner)
        if settings.local_objective == "classifier":
            return ClassifierObjective()
        name = type(learner.base_model).__name__
        if not has_one_shape(layer_shapes(learner.base_model, learner.stack)):
            raise ValueError(
                f"local_objective={settings.local_objective!r} does not work with model={name}, whose layers hand on "
                "hidden states of several shapes; set it to 'classifier' or 'none' (`lopt-hf image --method local` or "
                "`--method reach`)."
            )
        if settings.local_objective == "readout":
            return FrozenTailObjective(ModelTail(learner.base_model, learner.stack))
        return ReconstructionObjective(settings.reconstruction_bottleneck, masked=False)

    def make_heads(self, learner: Learner, objective: LocalObjective) -> LocalHeads:
        if isinstance(objective, FrozenTailObjective):
            # With the first block's head a checkpoint has the tail, which a resumed run cannot make again.
            heads: dict[int, nn.Module] = {block.index: nn.Identity() for block in learner.learning_blocks}
            if heads and 0 not in heads:  # a later stage of a pipeline
                learner.place(objective.tail, learner.learning_blocks[0])
            return LocalHeads({**heads, 0: objective.tail} if heads else {})
        if not isinstance(objective, ClassifierObjective):
            return super().make_heads(learner, objective)
        shapes = layer_shapes(learner.base_model, learner.stack)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(learner.seed)
            # All are made: a stage of a pipeline has some of them, and they are to be those of the whole model.
            heads = {
                block.index: make_classifier(learner.base_model, learner.stack, shapes, block.stop - 1)
                for block in learner.blocks[:-1]
            }
        return LocalHeads({block.index: heads[block.index] for block in learner.learning_blocks})

    def weight_of(self, learner: Learner, objective: LocalObjective) -> float:
        # Blocks share no weights, so that each learns with the task loss's own weight.
        return super().weight_of(learner, objective) if isinstance(objective, ReconstructionObjective) else 1.0

    def rate_advice(self, learner: Learner, learning_rate: float) -> str | None:
        return None  # LoPT's is of language models
