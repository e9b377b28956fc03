"""Healing: fine-tuning after layers were replaced or removed, also with the full model as a teacher."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from datasets import Dataset
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PreTrainedModel, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer

from lopt_hf.common.adapters import adapter_config
from lopt_hf.common.arithmetic import fit_to_machine
from lopt_hf.common.settings import option
from lopt_hf.common.training_numbers import check_training_numbers
from lopt_hf.data.formats import to_trl_format
from lopt_hf.data.loading import load_sft_dataset
from lopt_hf.data.prepared import check_prepared, say_what_was_cut
from lopt_hf.data.rows import RowError
from lopt_hf.data.texts import is_text, read_text
from lopt_hf.repl.distillation import DistillationArguments, TeacherMixin
from lopt_hf.repl.model import RepLModel
from lopt_hf.repl.placement import runs_of
from lopt_hf.repl.surgery import hooked_paths

__all__ = ["HEALING_FOLDER", "HealingConfig", "PlainHealingTrainer", "RepLTrainer", "heal", "healing_data"]

HEALING_FOLDER = "healing"


@dataclass
class HealingConfig(DistillationArguments, SFTConfig):
    """`SFTConfig` with `DistillationArguments`, without activation checkpointing, and for any machine.

    On one without an accelerator `use_cpu` is set, and `bf16`, if it is left out, to what is the faster.
    """

    # The parents' options that a comparison of models refuses; `--help` leaves them out
    idle_options: ClassVar[tuple[str, ...]] = ("resume_from_checkpoint", "eval_strategy", "push_to_hub", "seed")

    activation_checkpointing: bool | None = option(  # ours: fewer layers keep fewer activations
        False, "Recompute activations in the backward instead of keeping them."
    )

    def __post_init__(self) -> None:
        check_training_numbers(self)
        self.check_distillation()
        self.leaves_dtype_open = self.bf16 is None and not self.fp16
        fit_to_machine(self)
        super().__post_init__()


def healing_data(name: str, tokenizer: Any, length: int, data_dir: str | None = None) -> Dataset:
    """Loads healing data; text is cut into rows of `length` tokens.

    Raises:
        ValueError: If the data cannot be read or trained on; names the row.
        FileNotFoundError: If they cannot be found.
    """
    if not is_text(name):
        try:
            return to_trl_format(load_sft_dataset(name, data_dir=data_dir))  # type: ignore[return-value]
        except RowError as error:
            raise RowError(f"dataset_name={name}, {error}") from error
    text = read_text(name, "dataset_name", data_dir)
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [token_ids[start : start + length] for start in range(0, len(token_ids) - length + 1, length)]
    if not rows:
        raise ValueError(
            f"dataset_name={name!r} has {len(token_ids)} tokens, less than one row of max_length={length}; give a "
            "longer text, or lower max_length."
        )
    return Dataset.from_dict({"input_ids": rows})


class RepLTrainer(TeacherMixin, SFTTrainer):
    """`SFTTrainer` for a `RepLModel`, with the full model as a teacher.

    Without a teacher any trainer does: `SFTTrainer` itself, or `LoPTTrainer`.

    Args:
        model: What `get_repl_model` returned.
        *args: As for `SFTTrainer`.
        teacher: The full model, where `HealingConfig` has a `teacher_logits_weight` or `teacher_hidden_weight`. Load
            it anew: `get_repl_model` has changed the one that it was given.
        **kwargs: As for `SFTTrainer`.

    Raises:
        ValueError: If the model is no `RepLModel`; if the teacher is missing, or is not the model's; or if adapters
            are in a surrogate's way.
    """

    _tag_names = ["trl", "sft", "repl"]
    _name = "RepL"

    def __init__(self, model: Any, *args: Any, teacher: PreTrainedModel | None = None, **kwargs: Any) -> None:
        if not isinstance(model, RepLModel):
            name = model if isinstance(model, str) else type(model).__name__
            raise ValueError(f"model={name} is no unfolded RepL model; pass what get_repl_model returns.")
        if kwargs.get("peft_config") is not None:
            _check_adapters(model, kwargs["peft_config"])
        spans = runs_of(model.config.repl["removed"])
        super().__init__(model, *args, teacher=teacher, removed_spans=spans, **kwargs)


class PlainHealingTrainer(TeacherMixin, SFTTrainer):
    """`SFTTrainer` with a teacher, for a model of which layers were removed and nothing put in their place."""


def _check_adapters(model: Any, peft_config: Any) -> None:
    """Checks that what PEFT does with a module leaves its surrogate alone.

    OPT's MLP is no module of its own: the surrogate of `down_proj` follows `fc2`, inside the adapter of that, so what
    the adapter adds is mapped once it is merged, but not while it trains. DoRA scales what its layer puts out, that of
    `refit` with it, but merged the layer's own weights alone. A copy that PEFT makes to train a module has a hook of
    its own, with a copy of the surrogate.

    Raises:
        ValueError: If adapters or copies are in the way.
    """
    repl, hooked = model.config.repl, hooked_paths(model)
    targets, uses_dora = (vars(peft_config).get(name) for name in ("target_modules", "use_dora"))
    operator, place = repl["config"]["operator"], hooked[0].rpartition(".")[2]
    alike = [path for path, _ in model.named_modules() if path.endswith(f".{place}")]  # of every layer
    is_reached = targets is not None and any(_reaches(peft_config, path) for path in alike)
    if is_reached and repl["family"] == "opt" and operator == "down_proj":
        raise ValueError(
            f"lora_target_modules={targets} reaches fc2, behind which operator='down_proj' has its surrogate; leave "
            "fc2 out of lora_target_modules."
        )
    if is_reached and uses_dora and operator == "refit":
        raise ValueError(
            f"use_dora=True with lora_target_modules={targets} scales what operator='refit' adds to {place}, which is "
            f"lost when adapters are merged; leave {place} out of lora_target_modules, or use_dora."
        )
    for name in vars(peft_config).get("modules_to_save") or ():
        path = next((path for path in hooked if any(part.endswith(name) for part in _parents(path))), None)
        if path is not None:
            raise ValueError(
                f"lora_modules_to_save has {name!r}, of which PEFT trains a copy, but {path} runs a surrogate, which "
                f"would not learn; leave {name!r} out, or train the whole model."
            )


def _reaches(peft_config: Any, path: str) -> bool:
    """Whether PEFT puts an adapter on a linear layer of the decoder."""
    targets = peft_config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        peft_config = copy.copy(peft_config)
        peft_config.target_modules = {path}  # what PEFT replaces it by, before it leaves out `exclude_modules`
    return bool(check_target_module_exists(peft_config, path))


def _parents(path: str) -> list[str]:
    """A module's path, and those of all that it is part of."""
    return [path, *(path[: match.start()] for match in re.finditer("[.]", path))]


def heal(
    model: Any,
    seed: int,
    dataset: Dataset,
    args: HealingConfig,
    model_args: ModelConfig,
    tokenizer: Any,
    teacher: PreTrainedModel | None = None,
    removed: Sequence[int] = (),
) -> Any:
    """Fine-tunes a model, RepL or plain, and returns it without adapters and without the trainer's arithmetic.

    Args:
        model: The model.
        seed: Of the run.
        dataset: What it learns.
        args: How it learns.
        model_args: Whether it gets adapters.
        tokenizer: Its tokenizer.
        teacher: The full model, where `args` ask for it.
        removed: Layers that a plain model is without.
    """
    is_repl = "repl" in model.config.to_dict()
    kind = "repl" if is_repl else "plain" if removed else "full"
    run_args = replace(args, seed=seed, output_dir=f"{args.output_dir}/{HEALING_FOLDER}/{kind}-seed-{seed}")
    set_seed(seed)
    peft_config: Any = adapter_config(model_args)
    if peft_config is not None and is_repl:
        peft_config.modules_to_save = [*(peft_config.modules_to_save or ()), "surrogate"]
    taught: dict[str, Any] = {"teacher": teacher} if args.has_teacher else {}
    if not is_repl:
        taught["removed_spans"] = runs_of(removed)
    text_config = model.config.get_text_config()
    uses_cache = text_config.use_cache
    trainer_class: Any = RepLTrainer if is_repl else PlainHealingTrainer
    trainer = trainer_class(
        model, args=run_args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config, **taught
    )
    if not run_args.packing:
        say_what_was_cut(dataset, trainer.train_dataset, run_args.max_length)
    check_prepared(trainer.train_dataset, run_args)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if peft_config is not None:
        trained = trained.merge_and_unload()
    vars(trained).pop("forward", None)  # TRL's fused head, which unwrapping leaves there
    text_config.use_cache = uses_cache  # which the trainer switches off
    return trained
