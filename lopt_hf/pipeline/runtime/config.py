"""The pipeline's arguments joined to those of the methods."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lopt_hf.common.settings import check_left_out, option
from lopt_hf.local.reach import ReachText, read_cycle
from lopt_hf.local.run_facts import RunFacts
from lopt_hf.pipeline.gradient import default_gradient
from lopt_hf.pipeline.runtime.arguments import PipelineArguments
from lopt_hf.trainers.configs import LoPTConfig, MLAANConfig

__all__ = ["MLAANPipelineConfig", "ObjectivePipelineArguments", "PipelineConfig"]

# The arguments are mixed in before a config class; a type checker is told that they are one.
if TYPE_CHECKING:
    from lopt_hf.local.methods.lopt import LoPTArguments as ObjectiveBase
else:
    ObjectiveBase = object


@dataclass
class ObjectivePipelineArguments(PipelineArguments, ObjectiveBase):
    """Arguments of a pipeline whose early blocks have one objective each, or the task's gradient in its place.

    Parameters:
        task_reach: As in one process, where gradients are delayed: the number of blocks, which are stages, to which
            the task's gradient of an optimizer step travels, at its time. Of a step whose gradient does not come to a
            stage nothing is kept there, and where the gradient would have come the stage stands still, or learns from
            its objective alone. Default: all, at every step; with `gradient="local"` 1, none being sent.
    """

    # A parser of commands reads an option as the type that is named second: what `read_cycle` takes.
    task_reach: ReachText | str | int | list[int] | None = option(  # type: ignore[assignment]  # none once checked
        None,
        "Last stages to which a delayed gradient travels: a number, or a cycle over the steps such as '[1,1,1,2]'. "
        "Default: all, at every step (ours).",
    )

    def _settle_gradient(self) -> None:
        super()._settle_gradient()
        if self.task_reach is None:
            self.task_reach = [self.num_blocks if self.sends_gradients_back else 1]
        self.task_reach = cycle = read_cycle(self.task_reach)
        if not self.reach_recompute:
            raise ValueError(
                "reach_recompute=False does nothing in a pipeline, where no stage waits for a gradient of its step; "
                "leave it out, or set gradient_recompute to False where gradients are delayed."
            )
        highest = max(cycle, default=1)  # an empty one is refused with the others' values
        if highest > 1 and not self.sends_gradients_back:
            raise ValueError(
                f"task_reach={cycle} does not work with gradient='local', by which no gradient passes from one stage "
                "to another; set gradient to 'delayed' or 'local_and_delayed', or leave it out."
            )
        if highest == 1 and cycle and self.sends_gradients_back:
            raise ValueError(
                f"task_reach={cycle} with gradient={self.gradient!r} sends no gradient to any stage; leave it out, "
                "raise one of its numbers, or set gradient to 'local'."
            )
        if highest > 1 and self.reach_unit == "microbatch":
            raise ValueError(
                "reach_unit='microbatch' does not work in a pipeline, where the gradients of a step travel together; "
                "set it to 'step' or 'run'."
            )

    def _default_gradient(self) -> str:
        return default_gradient(self.local_objective, self.num_blocks, self.num_stages)

    def _settle_pipeline(self) -> None:
        super()._settle_pipeline()
        if self.gradient == "delayed":
            self._leave_out_objective()
            return
        if self.local_objective is None:
            self.local_objective = self._default_objective
        if self.local_backward == "joint":
            raise ValueError("local_backward='joint' needs all blocks in one process; set it to 'auto' or 'eager'.")
        if self.local_objective == "none":
            raise ValueError(
                "local_objective='none' leaves the early stages nothing to learn from in a pipeline; choose another."
            )

    def _leave_out_objective(self) -> None:
        """Sets the objective to none where the task's gradient takes its place."""
        if self.local_objective not in (None, "none"):
            raise ValueError(
                f"local_objective={self.local_objective!r} does nothing with gradient='delayed', where early stages "
                "learn from the task's gradient alone; leave it out, or set gradient to 'local' or "
                "'local_and_delayed'."
            )
        self.local_objective = "none"

    @property
    def _without_objective(self) -> tuple[str, str]:
        if self.gradient == "delayed":
            return "gradient='delayed'", "set gradient to 'local' or 'local_and_delayed'"
        return super()._without_objective

    def _check_added_to_objective(self, run: RunFacts) -> None:
        """Refuses nothing: the task's gradient has a backward of its own, in a later step."""


@dataclass
class PipelineConfig(ObjectivePipelineArguments, LoPTConfig):
    """Configuration of [`PipelineTrainer`]: every argument of [`LoPTConfig`] and those of the pipeline.

    Parameters:
        local_objective: As in one process, where `gradient` is `"local"` or `"local_and_delayed"`; naming one makes
            `"local"` the default of `gradient`. Default there: `"reconstruction"`.
    """

    # A string after `__post_init__`
    local_objective: str = option(
        None,
        "With gradient local or both: 'reconstruction' of a stage's input (default; LoPT), or 'readout', the next "
        "token through the model's norm and head, frozen (ZeroLock).",
        ["reconstruction", "readout", "none"],
    )


@dataclass
class MLAANPipelineConfig(PipelineArguments, MLAANConfig):
    """Configuration of [`MLAANPipelineTrainer`]: every argument of [`MLAANConfig`] and those of the pipeline.

    A window that would begin on an earlier stage begins with the first block of its own, so with one block per stage
    every window is of one block. A moving average stands beside copies of layers of the same stage only: what later
    stages learn does not travel backwards, so the copy of a layer of theirs trains alone.

    Parameters:
        window: As in `MLAANConfig`, inside a stage. Ours: 1, since a stage has one block by default.
    """

    window: int = option(  # type: ignore[misc]  # of the class where it is not a choice
        1, "Number of adjacent blocks that a loss reaches, at most those of its stage (ours: 1)."
    )

    def _settle_pipeline(self) -> None:
        super()._settle_pipeline()
        if self.sends_gradients_back:
            raise ValueError(
                f"gradient={self.gradient!r} does not work with method='mlaan', whose auxiliaries bring early stages "
                "the task; leave it out, or set method to 'lopt'."
            )
        if self.window == self.num_blocks:
            raise ValueError(
                f"window={self.window} is num_blocks, which is end-to-end training: its gradients cross stages; lower "
                "window, or train in one process."
            )
        if self.num_stages == self.num_blocks:
            check_left_out(
                self,
                ("ema_decay", "ema_layers", "combine"),
                "does nothing with one block per stage, where no leapt layer is on the stage of its block; leave it "
                "out, or set num_blocks above num_stages.",
            )
        if self.readout == "ema":
            raise ValueError(
                "readout='ema' follows a norm and LM head that only the last stage has; set it to 'frozen' or "
                "'trainable'."
            )
        if self.split == "auto" and self.split_at is None and self.leap_layers is not None:
            raise ValueError(
                f"split='auto' with leap_layers={self.leap_layers}: the cut decides which layers follow a block; set "
                "leap_share instead, or give split_at."
            )
