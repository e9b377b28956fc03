"""What differs between methods of local learning; a new method is a subclass of `Method` and its arguments."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.blocks import Block
from lopt_hf.local.boundary import GradientBoundary
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.hooks import BlockBoundary
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.local.run_facts import RunFacts
from lopt_hf.local.stacks import DecoderStack

__all__ = ["Batches", "Learner", "Method"]

Batches = Callable[[], Iterable[Mapping[str, Any]]]


class Learner(Protocol):
    """What a method may use of the `LocalLearner` that it is for.

    Attributes:
        base_model: The model that has the decoder.
        stack: Its decoder.
        blocks: The cut of its decoder layers.
        settings: The method's arguments.
        run: What the method must know of the run.
        seed: What the heads are drawn from.
        device: Where the run computes.
        router_coefficient: Weight of the load-balancing loss; 0 where the model has no routers.
        stage_starts: First blocks of the stages of a pipeline.
        heads: The heads, once they are made.
        boundary: The boundaries, once they are made.
        early_blocks: The early blocks that run in this process.
    """

    base_model: PreTrainedModel
    stack: DecoderStack
    blocks: list[Block]
    settings: Any
    run: RunFacts
    seed: int
    device: torch.device
    router_coefficient: float
    stage_starts: list[int]
    heads: LocalHeads
    boundary: BlockBoundary
    early_blocks: list[Block]

    @property
    def learning_blocks(self) -> list[Block]:
        """The early blocks of this process, if they learn."""

    def stage_stop(self, block: Block) -> int:
        """The layer behind the last one of the stage that a block is of."""

    @property
    def calibration_batches(self) -> Batches | None:
        """Gives batches of training data before training; without it nothing is to be calibrated."""

    def early_parameters(self) -> list[nn.Parameter]:
        """The parameters of all blocks but the last."""

    def device_of(self, block: Block) -> torch.device:
        """Where a block ends."""

    def place(self, module: nn.Module, block: Block) -> None:
        """Moves a block's head to where the block ends."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Makes the context in which the model computes."""

    def say(self, line: str) -> None:
        """Tells the user a line."""


class Method(ABC):
    """One method of local learning, for one `LocalLearner`.

    A method says what the early blocks learn from (`make_objective`), through what (`make_heads`) and how far each
    loss reaches (`make_boundary`); everything else has a default. It knows the learner, and no trainer: trainers,
    pipeline stages and the planner run the same one.

    Its arguments are a subclass of `LocalArguments` whose `make_method` makes it.
    """

    @abstractmethod
    def make_objective(self, learner: Learner) -> LocalObjective:
        """Makes what the early blocks learn from."""

    def make_heads(self, learner: Learner, objective: LocalObjective) -> LocalHeads:
        """Makes what the early blocks learn through; by default the head that the objective makes, if it makes one."""
        return LocalHeads.make(
            objective, learner.stack.hidden_size, learner.blocks, learner.seed, only=learner.learning_blocks
        )

    def make_boundary(self, learner: Learner, objective: LocalObjective, heads: LocalHeads) -> BlockBoundary:
        """Makes what keeps gradients where they belong; by default in their block."""
        return GradientBoundary(
            learner.base_model,
            learner.blocks,
            objective,
            heads,
            weight=1 / (len(learner.blocks) - 1),
            mode="joint" if learner.run.wants_one_backward else "eager",
            router_coefficient=learner.router_coefficient,
            early_blocks=learner.early_blocks,
        )

    # ---- The model ----

    def separates_embeddings(self, learner: Learner) -> bool:
        """Tells whether input embedding and LM head belong to different losses, so that they cannot share a weight."""
        return True

    def stage_needs(self, settings: Any) -> Literal["part", "readout", "model"]:
        """Tells what a stage of a pipeline loads for its early blocks.

        Args:
            settings: The method's arguments.

        Returns:
            `"part"`: its own layers; `"readout"`: the final norm and the LM head too, frozen; `"model"`: the whole
            model, of which it keeps its part when the heads are made.
        """
        return "part"

    # ---- The step ----

    def local_scale(
        self,
        inputs: Mapping[str, Any],
        num_items: torch.Tensor | int | None,
        accumulation_steps: int,
        num_processes: int,
    ) -> float:
        """Returns the factor of a micro-batch's local losses, each a mean over it; by default all weigh the same.

        Args:
            inputs: The micro-batch.
            num_items: Tokens with a label of the whole step, if the task loss is divided by them.
            accumulation_steps: Micro-batches of the step.
            num_processes: Processes over which `num_items` is counted and gradients are averaged.
        """
        return 1 / accumulation_steps

    def trains_early_blocks(self, learner: Learner, step: int) -> bool:
        """Tells whether the early blocks learn from their objective at an optimizer step, counted from 0."""
        if learner.settings.freezes_early_blocks or not learner.boundary.learns_locally:
            return False
        return bool(step % learner.settings.local_update_interval == 0)

    def begin_micro_batch(self, learner: Learner, step: int) -> None:
        """Prepares for a micro-batch of an optimizer step, counted from 0."""

    def after_step(self, learner: Learner) -> None:
        """Does what follows every optimizer step."""

    # ---- What is said and saved ----

    def own_name(self, settings: Any) -> str | None:
        """Returns what a run with these settings is called where it is not what the method's paper describes.

        Args:
            settings: The method's arguments.
        """
        return None

    def warnings(self, learner: Learner) -> Iterator[str]:
        """Yields what a user must know before training."""
        yield from ()

    def rate_advice(self, learner: Learner, learning_rate: float) -> str | None:
        """Returns what a user must know of the early blocks' learning rate, if anything."""
        return None

    def start_losses(self) -> dict[str, float]:
        """Returns the local losses before training by name, where the method measures them."""
        return {}

    @abstractmethod
    def fingerprint(self, learner: Learner, objective: LocalObjective) -> dict[str, Any]:
        """Returns the settings, as JSON, without whose equality a run cannot go on from a checkpoint.

        Those that every method has (blocks and their cut) are not among them.
        """
