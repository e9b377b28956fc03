"""What a stage of a pipeline costs by the parts of the model that it has, and by what early stages learn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lopt_hf.common.settings import check_choice
from lopt_hf.pipeline.gradient import GRADIENTS
from lopt_hf.pipeline.split.stopwatch import NOTHING, PartCost

__all__ = ["ModelCosts", "Passes", "StageCost"]


@dataclass(frozen=True)
class StageCost:
    """Cost of a stage of the pipeline, in seconds per micro-batch.

    Attributes:
        start: Its first decoder layer.
        stop: The layer after its last.
        forward: Its layers; on the first stage the embeddings, on the last the norm, the LM head and the task loss.
            As often as they run for a micro-batch.
        backward: Of the same.
        local: The local objective, forward and backward; 0 on the last stage.
        optimizer: Clipping and the optimizer's step, divided by the micro-batches of a step.
    """

    start: int
    stop: int
    forward: float
    backward: float
    local: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds per micro-batch in all."""
        return self.forward + self.backward + self.local + self.optimizer


class Passes(NamedTuple):
    """How often a stage runs forward and backward for a micro-batch."""

    forward: float
    backward: float


@dataclass(frozen=True)
class ModelCosts:
    """Costs of the parts of a model, and how often stages run them; by default once, as with local objectives.

    Attributes:
        embeddings: What runs before the layers: embeddings, masks, rotary angles.
        layers: Each decoder layer.
        objective: The local objective of one block, with its head.
        objectives: Local objectives that depend on where the block ends, by the first layer after it; they take the
            place of `objective`.
        head: What runs after the layers: final norm, LM head, task loss.
        step_seconds: Clipping and the optimizer's step, per trainable parameter.
        accumulation_steps: Micro-batches of an optimizer step.
        at_once: What stages but the last run in the step of a micro-batch.
        late: What they run besides when the task's gradient of that step has come.
        reaches: Stages, counted from the last, to which that gradient travels, at each step of a cycle; empty: to all.
    """

    embeddings: PartCost
    layers: tuple[PartCost, ...]
    objective: PartCost
    head: PartCost
    step_seconds: float
    accumulation_steps: int = 1
    objectives: Mapping[int, PartCost] = field(default_factory=dict)
    at_once: Passes = Passes(1, 1)
    late: Passes = Passes(0, 0)
    reaches: tuple[int, ...] = ()

    def with_gradient(self, gradient: str, recompute: bool = True, reaches: Sequence[int] = ()) -> "ModelCosts":
        """Returns the costs where stages but the last learn from the task's gradient, late, or from both.

        Args:
            gradient: One of `GRADIENTS`, see `PipelineArguments`.
            recompute: Whether a stage runs forward again when the gradient has come.
            reaches: Stages, counted from the last, to which the gradient travels, at each step of a cycle. Default:
                all.
        """
        check_choice("gradient", gradient, GRADIENTS)
        if gradient == "local":
            return self
        costs = replace(self, late=Passes(int(recompute), 1), reaches=tuple(reaches))
        if gradient == "local_and_delayed":
            return costs
        return replace(costs, objective=NOTHING, objectives={}, at_once=Passes(1, 0))

    def stage(self, start: int, stop: int, delay: int = 1) -> StageCost:
        """Returns the cost of a stage, of a cycle of steps the mean.

        Args:
            start: Its first layer.
            stop: The layer after its last.
            delay: Stages behind it; without effect on the last one and where gradients travel to all.
        """
        is_first, is_last = start == 0, stop == len(self.layers)
        parts = [*[self.embeddings] * is_first, *self.layers[start:stop], *[self.head] * is_last]
        objective = NOTHING if is_last else self.objectives.get(stop, self.objective)
        num_trainable = sum(part.num_trainable for part in [*parts, objective])
        passes = Passes(1, 1) if is_last else self._passes(delay)
        steps = min(1.0, passes.backward)  # without a gradient the optimizer passes over the stage
        return StageCost(
            start,
            stop,
            forward=passes.forward * sum(part.forward for part in parts),
            backward=passes.backward * sum(part.backward for part in parts),
            local=objective.forward + objective.backward,
            optimizer=steps * self.step_seconds * num_trainable / self.accumulation_steps,
        )

    def _passes(self, delay: int) -> Passes:
        comes = [reach > delay for reach in self.reaches] or [True]
        share = sum(comes) / len(comes)
        return Passes(*(once + share * late for once, late in zip(self.at_once, self.late, strict=True)))
