"""Arguments of the pipeline, alone and joined to those of the methods."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lopt_hf.common.settings import check_choice, option
from lopt_hf.local.reach import ReachText, read_cycle
from lopt_hf.local.run_facts import RunFacts
from lopt_hf.local.schedule import ReachSchedule
from lopt_hf.trainers.configs import LoPTConfig, MLAANConfig

__all__ = ["MLAANPipelineConfig", "ObjectivePipelineArguments", "PipelineArguments", "PipelineConfig"]

# The arguments are mixed in before a config class; a type checker is told that they are one.
if TYPE_CHECKING:
    from lopt_hf.local.methods.lopt import LoPTArguments as ObjectiveBase
    from lopt_hf.trainers.configs import LocalTrainingArguments as ArgumentsBase
else:
    ArgumentsBase = ObjectiveBase = object

GRADIENTS = ("local", "delayed", "local_and_delayed")

# Arguments of the parents that would need more than the stage has, or that reach into another stage's modules.
_UNSUPPORTED: dict[str, tuple[object, str]] = {
    "auto_find_batch_size": (False, "every stage must have the same batches"),
    "neftune_noise_alpha": (None, "the embeddings are on the first stage only"),
    "use_liger_kernel": (False, "it replaces modules that other stages hold"),
    "torch_compile": (False, "it is untested on a part of a model"),
    "load_best_model_at_end": (False, "the stages do not share an evaluation"),
    "clip_scope": ("block", "each stage clips its own blocks"),
    "enable_jit_checkpoint": (False, "when a signal comes, the stages are at different steps"),
}


@dataclass
class PipelineArguments(ArgumentsBase):
    """Arguments that the pipeline adds to a method's config: `class Mine(PipelineArguments, MyConfig)`.

    Source: PPLL, arXiv 2411.12780 ("paper"); its code and ZeroLock (arXiv 2608.07974) are named where they differ.

    Parameters:
        num_blocks: Blocks that the decoder layers are cut into. Default: one per stage (paper).
        num_stages: Processes that the blocks are spread over. Default: one per block (paper), or 2.
        data_parallel: Replicas of the whole pipeline, each with its share of the data. Ours; paper: 1.
        split: `"even"` cuts the layers as LoPT does, `"auto"` so that the slowest block is as fast as can be, measured
            when the run starts (paper's code: cut by hand).
        channel_depth: Hidden states that wait at each end of a link. Ours: 2, so that one is computed on while the
            next arrives; more smooths uneven stages and costs memory (paper's code: unbounded).
        peer_timeout: Seconds without a sign of life after which a process counts as lost. Ours: 20.
        start_timeout: Seconds that the other processes may take to start. Default: 300, that of torch's `TCPStore`.
        gradient: What an early stage learns from. `"local"`: its local objective (paper). `"delayed"`: the task's
            gradient, one optimizer step late for each stage behind it. `"local_and_delayed"`: both, the objective at
            once. Ours; PipeDream-2BW (arXiv 2006.09503) has the constant delay, of one step for all stages.
        gradient_recompute: Run a stage's forward again when the gradient has come, with the weights that it has then:
            what waits is one boundary tensor for each micro-batch, for one more forward. `False` keeps the graph, all
            activations of it, and a copy of the trainable weights of each step (PipeDream's weight stashing).
        timeline_steps: Record what each stage does in this many first steps, as picture and Chrome trace.

    Raises:
        ValueError: If a value is out of range, or an argument does not work in a pipeline.
    """

    # The parents' options of which a pipeline takes the defaults alone; `--help` leaves them out
    idle_options: ClassVar[tuple[str, ...]] = ("eval_strategy", "eval_steps", "train_vision", "reach_recompute")

    _other_evaluation: ClassVar[str] = " and evaluate the saved model with `lopt-hf retention`"

    # An integer after `__post_init__`
    num_blocks: int = option(None, "Number of blocks the decoder layers are cut into. Default: one per stage (paper).")
    num_stages: int | None = option(
        None, "Processes that the blocks are spread over. Default: one per block (paper), or 2."
    )
    data_parallel: int = option(1, "Replicas of the whole pipeline, each with its share of the data (ours).")
    split: str = option(
        "even",
        "'even' cuts the layers evenly, 'auto' by measured time per layer, embeddings, head and local objective "
        "included. `split_at` wins over both.",
        ("even", "auto"),
    )
    channel_depth: int = option(2, "Hidden states that may wait at each end of a link between two stages (ours).")
    peer_timeout: float = option(20.0, "Seconds without a sign of life after which a process counts as lost (ours).")
    start_timeout: float = option(
        300.0, "Seconds that the other processes may take to start (torch's default for its store)."
    )
    gradient: str = option(
        "local",
        "What an early stage learns from: its 'local' objective (paper), the task's gradient 'delayed' by one "
        "optimizer step for each stage behind it (ours), or both: 'local_and_delayed'.",
        GRADIENTS,
    )
    gradient_recompute: bool = option(
        True,
        "Where gradients are delayed: run a stage's forward again when its gradient comes, with the weights of then; "
        "False keeps the graph and a copy of the weights instead (ours).",
    )
    timeline_steps: int = option(0, "Record this many first steps of every stage, as timeline.png and timeline.json.")

    def __post_init__(self) -> None:
        self._check_pipeline()
        super().__post_init__()
        if self.activation_checkpointing and not self.gradient_recompute:
            raise ValueError(
                "gradient_recompute=False does not work with activation_checkpointing=True (the default), which runs "
                "layers again with other weights; set activation_checkpointing to False."
            )

    def _check_pipeline(self) -> None:
        lowest = {"data_parallel": 1, "channel_depth": 1, "timeline_steps": 0, "num_blocks": 2, "num_stages": 2}
        for name, least in lowest.items():
            value = getattr(self, name)
            is_left_out = value is None and name in ("num_blocks", "num_stages")
            if not is_left_out and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
        self.num_blocks = self.num_blocks or self.num_stages or 2
        self.num_stages = self.num_stages or self.num_blocks
        if self.num_stages > self.num_blocks:
            raise ValueError(
                f"num_stages={self.num_stages} is more than num_blocks={self.num_blocks}, but a stage runs one block "
                "or several; lower num_stages, or leave num_blocks out for one block per stage."
            )
        if not self.peer_timeout >= 5:
            raise ValueError(f"peer_timeout={self.peer_timeout} is too short for a busy machine; give at least 5 s.")
        if not self.start_timeout >= self.peer_timeout:
            raise ValueError(
                f"start_timeout={self.start_timeout} is shorter than peer_timeout={self.peer_timeout}; raise it."
            )
        if self.split not in ("even", "auto"):
            raise ValueError(f"split={self.split!r} is unknown; choose 'even' or 'auto', or give split_at.")
        if str(self.eval_strategy) not in ("no", "IntervalStrategy.NO"):
            raise ValueError(
                f"eval_strategy={self.eval_strategy!r} is not supported in a pipeline; set it to 'no'"
                f"{self._other_evaluation}."
            )
        self._check_gradient()
        for name, (allowed, reason) in _UNSUPPORTED.items():
            if getattr(self, name) not in (allowed, None):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not work in a pipeline: {reason}; leave it out."
                )

    @property
    def schedule(self) -> ReachSchedule:
        """To which blocks the task's gradient of which step comes; by default to all where it is sent back."""
        schedule = super().schedule
        if self.sends_gradients_back and schedule.highest == 1:
            return ReachSchedule((self.num_blocks,), self.num_blocks)
        return schedule

    @property
    def sends_gradients_back(self) -> bool:
        """Whether the task's gradient goes from stage to stage."""
        return self.gradient != "local"

    def gradient_settings(self, num_stages: int) -> dict[str, Any]:
        """What a run with gradients on their way cannot change, by name.

        Args:
            num_stages: Stages of the run.
        """
        if not self.sends_gradients_back:
            return {"gradient": self.gradient}
        return {
            "gradient": self.gradient,
            "gradient_recompute": self.gradient_recompute,
            "num_stages": num_stages,
            "task_reach": list(self.schedule.cycle),
            "reach_unit": self.schedule.unit,
        }

    def _check_gradient(self) -> None:
        check_choice("gradient", self.gradient, GRADIENTS)
        if not self.sends_gradients_back:
            if not self.gradient_recompute:
                raise ValueError(
                    "gradient_recompute=False does nothing with gradient='local', which keeps no graph; leave it out."
                )
            return
        wrong = f"does not work with gradient={self.gradient!r}"
        schedule, optim = SchedulerType(self.lr_scheduler_type).value, OptimizerNames(self.optim).value
        conflicts = [
            (
                self.num_blocks != self.num_stages,
                f"num_blocks={self.num_blocks} with num_stages={self.num_stages} {wrong}, which crosses the cuts "
                "between stages only; leave num_blocks out",
            ),
            (self.local_step, f"local_step=True {wrong}, which comes after the local backward; set it to False"),
            (
                not self.train_early_blocks,
                f"train_early_blocks=False {wrong}, which trains them; leave it out, or set gradient to 'local'",
            ),
            (self.fp16, f"fp16=True {wrong}, since each stage scales its loss by itself; use bf16"),
            (
                schedule in ("reduce_lr_on_plateau", "greedy"),
                f"lr_scheduler_type={schedule!r} {wrong}: the stages must know the rates of a step before its loss; "
                "choose one that is a function of the step, such as cosine",
            ),
            (
                optim in ("lomo", "adalomo") or optim.endswith("layerwise"),
                f"optim={optim!r}, which steps in the backward, {wrong}; choose another",
            ),
            (
                not self.gradient_recompute and self.gradient != "delayed",
                f"gradient_recompute=False {wrong}, whose local backward frees the graph; set it to True",
            ),
        ]
        for exists, conflict in conflicts:
            if exists:
                raise ValueError(f"{conflict}.")


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
        "Where gradients are delayed: stages, counted from the last, to which the gradient of an optimizer step "
        "travels: a number, or a cycle over the steps such as '[1,1,1,2]'. Default: all, at every step (ours).",
    )

    def _check_gradient(self) -> None:
        super()._check_gradient()
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

    def _check_pipeline(self) -> None:
        super()._check_pipeline()
        if self.gradient == "delayed":
            self._leave_out_objective()
            return
        if self.local_backward == "joint":
            raise ValueError("local_backward='joint' needs all blocks in one process; set it to 'auto' or 'eager'.")
        if self.local_objective == "none":
            raise ValueError(
                "local_objective='none' leaves the early stages nothing to learn from in a pipeline; choose another."
            )

    def _leave_out_objective(self) -> None:
        """Sets the objective to none where the task's gradient takes its place."""
        if self.local_objective == "readout":
            raise ValueError(
                "local_objective='readout' does nothing with gradient='delayed', where early stages learn from the "
                "task's gradient alone; leave it out, or set gradient to 'local_and_delayed'."
            )
        self.local_objective = "none"

    @property
    def _without_objective(self) -> tuple[str, str]:
        if self.gradient == "delayed":
            return "gradient='delayed'", "set gradient to 'local_and_delayed'"
        return super()._without_objective

    def _check_added_to_objective(self, run: RunFacts) -> None:
        """Refuses nothing: the task's gradient has a backward of its own, in a later step."""


@dataclass
class PipelineConfig(ObjectivePipelineArguments, LoPTConfig):
    """Configuration of [`PipelineTrainer`]: every argument of [`LoPTConfig`] and those of the pipeline."""


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

    def _check_pipeline(self) -> None:
        super()._check_pipeline()
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
        for name in ("ema_decay", "ema_layers", "combine"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.num_stages == self.num_blocks and value != default:
                raise ValueError(
                    f"{name}={value!r} does nothing with one block per stage, where no leapt layer is on the stage of "
                    "its block; leave it out, or set num_blocks above num_stages."
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
