"""Arguments that the pipeline adds to those of any method."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.trainer_utils import HubStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from lopt_hf.common.settings import check_choice, option
from lopt_hf.local.run_facts import steps_in_backward
from lopt_hf.local.schedule import ReachSchedule
from lopt_hf.pipeline.gradient import GRADIENTS

__all__ = ["PipelineArguments"]

# The arguments are mixed in before a config class; a type checker is told that they are one.
if TYPE_CHECKING:
    from lopt_hf.trainers.configs import LocalTrainingArguments as ArgumentsBase
else:
    ArgumentsBase = object


_WITH_MOMENTS = ("adamw_torch", "adamw_torch_fused")  # which keep their moments under torch's names

# Arguments of the parents that would need more than the stage has, or that reach into another stage's modules.
_UNSUPPORTED: dict[str, tuple[object, str]] = {
    "auto_find_batch_size": (False, "every stage must have the same batches"),
    "neftune_noise_alpha": (None, "the embeddings are on the first stage only"),
    "label_smoothing_factor": (0, "TRL takes its loss from a second forward, and local losses do not know it"),
    "eval_on_start": (False, "the stages do not evaluate together"),
    "trust_remote_code": (False, "stages are made of models that transformers has itself"),
    "use_liger_kernel": (False, "it replaces modules that other stages hold"),
    "torch_compile": (False, "it is untested on a part of a model"),
    "load_best_model_at_end": (False, "the stages do not share an evaluation"),
    "clip_scope": ("block", "each stage clips its own blocks"),
    "enable_jit_checkpoint": (False, "when a signal comes, the stages are at different steps"),
    "save_only_model": (
        False,
        "a stage's checkpoint is what its run goes on from; `lopt-hf pipeline export` makes a model",
    ),
}

_PUSHED = ("every_save", "end")  # the default, which nobody need have asked for, and what is done

# Ways to share out batches that accelerate knows, which replicas of a pipeline do in one way only
_OF_BATCHES: dict[str, object] = {"split_batches": False, "dispatch_batches": None, "even_batches": True}


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
            once. Default: `"delayed"` (ours, for what it learns; PipeDream-2BW, arXiv 2006.09503, has the constant
            delay, of one step for all stages); `"local"` where a local objective is named or a stage has several
            blocks.
        gradient_recompute: Run a stage's forward again when the gradient has come, with the weights that it has then:
            what waits is one boundary tensor for each micro-batch, for one more forward. `False` keeps the graph, all
            activations of it, and a copy of the trainable weights of each step (PipeDream's weight stashing).
        weight_prediction: Run a stage's forward with the weights that it is expected to have when the gradient comes:
            moved on by so many steps as that takes, by Adam's moments of now (XPipe, arXiv 1911.04610). It costs a
            copy of the stage's trainable weights. Default: where `gradient` is `"delayed"` on three stages or more and
            `optim` keeps such moments (ours).
        late_warmup_steps: Optimizer steps, or below 1 a share of the run's, in which the learning rate of a stage
            whose gradient is d steps late rises from 1 / (1 + d) of its schedule to the whole of it (PipeMare,
            arXiv 1910.05124). Default: where weights are predicted, 4 for each stage but at most half of the run, and
            the rates are higher in all steps by the root of what that takes from their sum (ours); else 0.
        timeline_steps: Record what each stage does in this many first steps, as picture and Chrome trace.

    Raises:
        ValueError: If a value is out of range, or an argument does not work in a pipeline.
    """

    # The parents' options of which a pipeline takes the defaults alone; `--help` leaves them out
    idle_options: ClassVar[tuple[str, ...]] = (
        *("eval_strategy", "eval_steps", "train_vision", "reach_recompute", "load_in_4bit", "load_in_8bit"),
    )

    _other_evaluation: ClassVar[str] = " and evaluate the saved model with `lopt-hf retention`"

    # An integer after `__post_init__`
    num_blocks: int = option(None, "Number of blocks the decoder layers are cut into. Default: one per stage (paper).")
    num_stages: int | None = option(
        None, "Processes that the blocks are spread over. Default: one per block (paper), or 2."
    )
    data_parallel: int = option(1, "Replicas of the whole pipeline, each with its share of the data (ours).")
    split: str = option(
        "even",
        "'even' cuts layers evenly, 'auto' by measured times; `split_at` wins over both.",
        ("even", "auto"),
    )
    channel_depth: int = option(2, "Hidden states that may wait at each end of a link between two stages (ours).")
    peer_timeout: float = option(20.0, "Seconds without a sign of life after which a process counts as lost (ours).")
    start_timeout: float = option(
        300.0, "Seconds that the other processes may take to start (torch's default for its store)."
    )
    # One of `GRADIENTS` after `__post_init__`
    gradient: str = option(
        None,
        "What early stages learn from: a 'local' objective (paper), the task's gradient 'delayed' by a step for each "
        "stage behind (default; ours), or both. Where an objective is named or a stage has several blocks: local.",
        GRADIENTS,
    )
    gradient_recompute: bool = option(
        True,
        "Run a forward again when its delayed gradient comes; False keeps its graph and a copy of the weights (ours).",
    )
    weight_prediction: bool | None = option(
        None,
        "Run a forward with the weights expected when its delayed gradient comes, for a copy of them (XPipe). "
        "Default: from three stages on.",
    )
    late_warmup_steps: float | None = option(
        None,
        "Steps, or below 1 a share of them, in which the rates of stages with delayed gradients rise. Default: with "
        "predicted weights 4 for each stage.",
    )
    timeline_steps: int = option(0, "Record this many first steps of every stage, as timeline.png and timeline.json.")

    def __post_init__(self) -> None:
        self._settle_pipeline()
        super().__post_init__()
        self._check_replicas()
        self._check_packing()
        if self.activation_checkpointing and not self.gradient_recompute:
            raise ValueError(
                "gradient_recompute=False does not work with activation_checkpointing=True (the default), which runs "
                "layers again with other weights; set activation_checkpointing to False."
            )

    def _default_gradient(self) -> str:
        """Returns what early stages learn from where the user has not said it."""
        return "local"

    def _settle_pipeline(self) -> None:
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
        if self.data_parallel > 1 and not self.average_tokens_across_devices:  # which its parent sets for one process
            raise ValueError(
                f"average_tokens_across_devices=False with data_parallel={self.data_parallel} does nothing: replicas "
                "divide their losses by the tokens of all; leave it out."
            )
        if self.gradient is None:
            self.gradient = self._default_gradient()
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
        if str(self.save_strategy) in ("best", "SaveStrategy.BEST"):
            raise ValueError(
                "save_strategy='best' does not work in a pipeline, whose stages do not evaluate; set it to 'steps', "
                "'epoch' or 'no'."
            )
        for name in ("fsdp", "deepspeed"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value!r} does not work in a pipeline, where each process has a stage of its own; leave "
                    "it out."
                )
        if self.push_to_hub and HubStrategy(self.hub_strategy).value not in _PUSHED:
            raise ValueError(
                f"hub_strategy={HubStrategy(self.hub_strategy).value!r} does not work in a pipeline, which "
                "uploads the model at its end and no checkpoint; set it to 'end'."
            )
        self._settle_gradient()
        for name, (allowed, reason) in _UNSUPPORTED.items():
            value = vars(self).get(name)  # those of language models are not among the arguments of image models
            if value not in (allowed, None):
                raise ValueError(f"{name}={value!r} does not work in a pipeline: {reason}; leave it out.")

    def _check_replicas(self) -> None:
        """Refuses what replicas would not do: each takes whole batches in turns, and counts its own tokens."""
        for name, only in _OF_BATCHES.items():
            value = getattr(self.accelerator_config, name)
            if value != only:
                raise ValueError(
                    f"accelerator_config: {name}={value!r} does nothing in a pipeline, whose replicas take whole "
                    "batches in turns; leave it out."
                )
        if self.data_parallel == 1:
            return
        if self.include_num_input_tokens_seen != "no":
            raise ValueError(
                f"include_num_input_tokens_seen={self.include_num_input_tokens_seen!r} with "
                f"data_parallel={self.data_parallel} would count one replica's tokens; leave it out, and see "
                "num_tokens in the logs."
            )

    def _check_packing(self) -> None:
        given = vars(self)  # images have none of these
        if given.get("padding_free") and not given["packing"] and given["max_length"] is not None:
            raise ValueError(
                f"padding_free=True does not keep to max_length={given['max_length']} without packing; set packing to "
                "True, or leave padding_free out."
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

    def late_warmup(self, max_steps: int) -> tuple[int, int | None]:
        """Returns the steps in which the rates of stages whose gradients are late rise, and those that make up for it.

        Args:
            max_steps: Steps of the run.
        """
        given = self.late_warmup_steps
        if given is not None:
            return math.ceil(max_steps * given if given < 1 else given), None
        assert self.num_stages is not None
        return (min(4 * self.num_stages, max_steps // 2), max_steps) if self.weight_prediction else (0, None)

    def gradient_settings(self, num_stages: int) -> dict[str, Any]:
        """What a run with gradients on their way cannot change, by name.

        Args:
            num_stages: Stages of the run.
        """
        if not self.sends_gradients_back:
            return {"gradient": self.gradient}
        return {
            "gradient": self.gradient,
            "num_stages": num_stages,  # before what follows from it by default
            "gradient_recompute": self.gradient_recompute,
            "weight_prediction": self.weight_prediction,
            "task_reach": list(self.schedule.cycle),
            "reach_unit": self.schedule.unit,
        }

    def _settle_gradient(self) -> None:
        check_choice("gradient", self.gradient, GRADIENTS)
        self._settle_weight_prediction()
        self._check_late_warmup()
        if self.sends_gradients_back:
            self._check_delayed()
        elif not self.gradient_recompute:
            raise ValueError(
                "gradient_recompute=False does nothing with gradient='local', which keeps no graph; leave it out."
            )

    def _settle_weight_prediction(self) -> None:
        if self.weight_prediction and self.gradient != "delayed":
            raise ValueError(
                f"weight_prediction=True does not work with gradient={self.gradient!r}, where the weights of now are "
                "to learn from a forward; leave it out, or set gradient to 'delayed'."
            )
        has_moments = OptimizerNames(self.optim).value in _WITH_MOMENTS
        if self.weight_prediction and not has_moments:
            raise ValueError(
                f"weight_prediction=True needs Adam's moments, which optim={OptimizerNames(self.optim).value!r} does "
                f"not keep as tensors; choose {' or '.join(map(repr, _WITH_MOMENTS))}, or set it to False."
            )
        if self.weight_prediction is None:
            self.weight_prediction = self.gradient == "delayed" and self.num_blocks > 2 and has_moments

    def _check_late_warmup(self) -> None:
        if self.late_warmup_steps is not None and not 0 <= self.late_warmup_steps < math.inf:
            raise ValueError(
                f"late_warmup_steps={self.late_warmup_steps} must be a number of steps, or a share of them below 1."
            )
        if self.late_warmup_steps and not self.sends_gradients_back:
            raise ValueError(
                f"late_warmup_steps={self.late_warmup_steps} does nothing with gradient='local', by which no gradient "
                "is late; leave it out, or set warmup_steps."
            )

    def _check_delayed(self) -> None:
        wrong = f"does not work with gradient={self.gradient!r}"
        schedule, optim = SchedulerType(self.lr_scheduler_type).value, OptimizerNames(self.optim).value
        conflicts = [
            (
                self.num_blocks != self.num_stages,
                f"num_blocks={self.num_blocks} with num_stages={self.num_stages} {wrong}, which crosses the cuts "
                "between stages only; leave num_blocks out, or set gradient to 'local'",
            ),
            (
                self.local_step,
                f"local_step=True {wrong}, which comes after the local backward; set it to False, or gradient to "
                "'local'",
            ),
            (
                not self.train_early_blocks,
                f"train_early_blocks=False {wrong}, which trains them; leave it out, or set gradient to 'local'",
            ),
            (
                self.fp16,
                f"fp16=True {wrong}, since each stage scales its loss by itself; use bf16, or set gradient to 'local'",
            ),
            (
                schedule in ("reduce_lr_on_plateau", "greedy"),
                f"lr_scheduler_type={schedule!r} {wrong}: the stages must know the rates of a step before its loss; "
                "choose one that is a function of the step, such as cosine, or set gradient to 'local'",
            ),
            (
                steps_in_backward(optim),
                f"optim={optim!r}, which steps in the backward, {wrong}; choose another, or set gradient to 'local'",
            ),
            (
                not self.gradient_recompute and self.gradient != "delayed",
                f"gradient_recompute=False {wrong}, whose local backward frees the graph; set it to True",
            ),
        ]
        for exists, conflict in conflicts:
            if exists:
                raise ValueError(f"{conflict}.")
