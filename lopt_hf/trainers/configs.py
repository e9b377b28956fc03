"""Training arguments: those of a method of local learning joined to a TRL trainer's config."""

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import DPOConfig, GRPOConfig, SFTConfig
from trl.trainer.utils import get_config_model_id

from lopt_hf.common.arithmetic import fit_to_machine
from lopt_hf.common.settings import check_choice, option
from lopt_hf.common.training_numbers import check_training_numbers
from lopt_hf.local.methods.lopt import LoPTArguments
from lopt_hf.local.methods.mlaan.method import MLAANArguments
from lopt_hf.local.run_facts import RunFacts
from lopt_hf.trainers.engines import asked_engine

__all__ = [
    "LoPTConfig",
    "LoPTDPOConfig",
    "LoPTGRPOConfig",
    "LocalTrainingArguments",
    "MLAANConfig",
    "convert_config",
    "local_config",
]

# The arguments are mixed in before a config class; a type checker is told that they are one.
if TYPE_CHECKING:
    from lopt_hf.local.arguments import LocalArguments

    class ArgumentsBase(LocalArguments, TrainingArguments):
        """Both sides of the join."""
else:
    ArgumentsBase = object

# Those of `DPOTrainer.compute_loss` (TRL 1.16)
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# Those of `GRPOTrainer._compute_loss` (TRL 1.16)
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo")

ConfigT = TypeVar("ConfigT", bound=TrainingArguments)


@dataclass
class LocalTrainingArguments(ArgumentsBase):
    """Joins a method's arguments to a TRL config: `class Mine(LocalTrainingArguments, MyArguments, SFTConfig)`.

    It checks the method's arguments first, alone and against the run. On a machine without an accelerator `use_cpu`
    is set, so that the defaults run, and `bf16`, where nobody has said, is the faster of the two types.

    Raises:
        ValueError: If a value is out of range, or does not work in this run; the message names field, value and fix.
    """

    _task: ClassVar[str] = "SFT"

    def __post_init__(self) -> None:
        # First of all: transformers' own checks need the engine that they are for to be installed.
        self.check()
        self.check_run(self.run_facts)
        check_training_numbers(self, beta_is_positive=self._task == "DPO")
        fit_to_machine(self)
        super().__post_init__()
        self.check_run(self.run_facts)  # again, as the parent has read some of them from text, or under older names
        if self.reach_anneal and self.lr_scheduler_type == SchedulerType.CONSTANT:
            raise ValueError(
                "reach_anneal=True does nothing with lr_scheduler_type='constant', which never falls; set it to "
                "False, or lr_scheduler_type to 'cosine'."
            )

    @property
    def run_facts(self) -> RunFacts:
        """What the method must know of the run; the engine is the one that it asks for."""
        launched_as = os.environ.get("ACCELERATE_MIXED_PRECISION")  # counts where neither fp16 nor bf16 is set
        checkpointing: Any = self.gradient_checkpointing_kwargs
        reentrant = isinstance(checkpointing, dict) and checkpointing.get("use_reentrant", False)
        return RunFacts(
            task=self._task,
            engine=asked_engine(self),
            optim=OptimizerNames(self.optim).value,
            is_fp16=bool(self.fp16 or (self.bf16 is False and launched_as == "fp16")),
            reentrant_checkpointing=bool(self.gradient_checkpointing and reentrant),
            may_save_in_mid_step=self.enable_jit_checkpoint,
            accumulation_steps=self.gradient_accumulation_steps,
            is_compiled=self.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no",
            uses_liger=self.use_liger_kernel,
            offloads_activations=getattr(self, "activation_offloading", False),  # TRL's, for SFT
        )


@dataclass
class LoPTConfig(LocalTrainingArguments, LoPTArguments, SFTConfig):
    """Configuration of [`LoPTTrainer`]: every argument of [`~trl.SFTConfig`] and those of LoPT."""


@dataclass
class MLAANConfig(LocalTrainingArguments, MLAANArguments, SFTConfig):
    """Configuration of [`MLAANTrainer`]: every argument of [`~trl.SFTConfig`] and those of MLAAN."""


@dataclass
class LoPTDPOConfig(LocalTrainingArguments, LoPTArguments, DPOConfig):
    """Configuration of [`LoPTDPOTrainer`]: every argument of [`~trl.DPOConfig`] and those of LoPT.

    The LoPT paper has no DPO; the defaults besides LoPT's are TRL's.

    Raises:
        ValueError: If a value is out of range, or if `local_objective` is `"readout"`.
    """

    _task: ClassVar[str] = "DPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        for loss in self.loss_type:  # TRL looks at them in the first step
            check_choice("loss_type", loss, DPO_LOSSES)


@dataclass
class LoPTGRPOConfig(LocalTrainingArguments, LoPTArguments, GRPOConfig):
    """Configuration of [`LoPTGRPOTrainer`]: every argument of [`~trl.GRPOConfig`] and those of LoPT.

    Where TRL's default is not the paper's, the paper's is the default here.

    Parameters:
        learning_rate: Paper: 5e-6. Its released script has 1e-6, as TRL.
        num_generations: Completions per prompt. Paper: 4.
        temperature: Of sampling. Paper: 0.7.
        top_p: Of sampling. Paper: 0.95.
        epsilon: Where the probability ratio is clipped. Paper: 0.2, as TRL.
        beta: Weight of the KL divergence from the reference model. Paper: 0, no reference model, as TRL.
        loss_type: How the tokens' losses are averaged. Code: `"grpo"`, over each completion first.

    Raises:
        ValueError: If a value is out of range, or if `local_objective` is `"readout"`.
    """

    _task: ClassVar[str] = "GRPO"

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, GRPO_LOSSES)  # TRL looks at these in the first step
        if isinstance(self.scale_rewards, str):  # or true or false
            check_choice("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        super().__post_init__()

    learning_rate: float = option(5e-6, "The initial learning rate for AdamW (paper: 5e-6; released script: 1e-6).")
    num_generations: int | None = option(
        4,
        "Completions per prompt (paper: 4). The number of processes times per_device_train_batch_size "
        "times gradient_accumulation_steps must be a multiple of it.",
    )
    temperature: float = option(0.7, "Temperature of sampling (paper: 0.7).")
    top_p: float = option(0.95, "Sample from the likeliest tokens that sum to this probability (paper: 0.95).")
    epsilon: float = option(0.2, "Where the probability ratio is clipped (paper: 0.2).")
    beta: float = option(0.0, "Weight of the KL divergence from a reference model (paper: 0, none).")
    loss_type: str = option(
        "grpo",
        "How the tokens' losses are averaged: 'grpo' over each completion first (released script), or "
        "another of GRPOConfig's, such as 'dapo', TRL's default.",
    )


def convert_config(args: TrainingArguments, config_class: type[ConfigT]) -> ConfigT:
    """Makes a config of another class with the same values; what the class does not know is left out.

    Args:
        args: Arguments that have been through their class's checks.
        config_class: The class to make, such as `SFTConfig` of a `LoPTConfig`, or the other way round.
    """
    known = {f.name for f in fields(config_class) if f.init}
    # Not by `to_dict`, which hides every field whose name ends in `_token`.
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
    if values.get("steps_per_generation") is not None:
        values.pop("generation_batch_size")  # GRPOConfig has computed one from the other, and takes one only
    return config_class(**values)


def local_config(
    model: str | PreTrainedModel, args: TrainingArguments | None, config_class: type[ConfigT], suffix: str
) -> ConfigT:
    """The arguments of a trainer with local learning, from what a user passed as `args`.

    Args:
        model: The model, whose name begins the default output folder.
        args: A config of this class, of its parent in TRL, or none.
        config_class: The class that the trainer needs.
        suffix: The end of the default output folder's name.

    Raises:
        ValueError: If the arguments are of another method or task, so that some would be lost.
    """
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_id.split('/')[-1]}-{suffix}")
    if isinstance(args, config_class):
        return args
    known = {each.name for each in fields(config_class)}
    lost = [each.name for each in fields(args) if each.init and each.name not in known]
    if lost:
        raise ValueError(
            f"args is {type(args).__name__}, whose {lost[0]!r} this trainer does not know; pass "
            f"{config_class.__name__}, or use the trainer that {type(args).__name__} is for."
        )
    return convert_config(args, config_class)
