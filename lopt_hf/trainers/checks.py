"""Errors that a user can act on, raised before anything expensive happens."""

import copy
import inspect
import math
import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel, PrefixTuningConfig
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType, get_last_checkpoint
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available
from trl import GRPOConfig, SFTConfig
from trl.data_utils import get_dataset_column_names

from lopt_hf.common.quantization import check_trainable, is_quantized
from lopt_hf.common.settings import check_folder
from lopt_hf.local.arguments import LocalArguments
from lopt_hf.local.blocks import split_layers
from lopt_hf.local.learner import LocalLearner
from lopt_hf.local.run_facts import LOMO
from lopt_hf.local.stacks import check_architecture, find_decoder_stack

__all__ = [
    "check_dataset",
    "check_finite",
    "check_fsdp",
    "check_heads_step",
    "check_model",
    "check_neftune",
    "check_no_model_is_lost",
    "check_output_dir",
    "check_own_optimizer",
    "check_questions",
    "check_rewards",
    "check_run_settings",
    "check_sft_dataset",
    "load_config",
]

# What `GRPOTrainer` (TRL 1.16) calls a reward function with besides the training set's columns, but for these two
_REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_RENAMED_COLUMNS = ("prompt", "completion")

# What tells that a folder holds a model, or its adapter
_OF_A_MODEL = ("config.json", "adapter_config.json", "model*.safetensors", "adapter_model*", "pytorch_model*.bin")

_SFT_LAYOUTS = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"})


def check_output_dir(output_dir: str, resume_from_checkpoint: str | bool | None) -> None:
    """Raises if a new run would mix its checkpoints with another run's.

    Raises:
        ValueError: If `output_dir` is no folder that could be, or holds checkpoints and the run does not resume.
    """
    if not output_dir:
        raise ValueError("output_dir='' names no folder; name one.")
    check_folder("output_dir", output_dir)
    if resume_from_checkpoint or not os.path.isdir(output_dir):
        return
    last = get_last_checkpoint(output_dir)
    if last is not None:
        raise ValueError(
            f"output_dir={output_dir!r} holds another run's checkpoints (the last is {os.path.basename(last)!r}); "
            "continue that run with resume_from_checkpoint=True, or choose another output_dir."
        )


def check_no_model_is_lost(output_dir: str, model: str | None) -> None:
    """Raises if a run that starts anew would save its model over another, or over the one that it starts from.

    Args:
        output_dir: Where the model is saved.
        model: The model that the run starts from.

    Raises:
        ValueError: With the file that would be lost.
    """
    folder = Path(output_dir)
    if model is not None and folder.is_dir() and Path(model).is_dir() and folder.samefile(model):
        raise ValueError(
            f"output_dir={output_dir!r} is the model that the run starts from; choose another output_dir."
        )
    for pattern in _OF_A_MODEL:
        found = next(folder.glob(pattern), None)
        if found is not None:
            raise ValueError(
                f"output_dir={output_dir!r} holds a model ({found.name}) that would be overwritten; choose another "
                "output_dir, or remove it."
            )


def check_run_settings(args: TrainingArguments) -> None:
    """Raises if a run would end by a setting that transformers and TRL look at when the model is loaded, or never.

    Raises:
        ValueError: If a setting has no effect or cannot be read; the message names option, value and fix.
        ImportError: If one needs a package that is not here; names it.
    """
    _check_optimizer(args)
    _check_scheduler(args)
    _check_trackers(args)
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError(
            "use_liger_kernel=True needs liger-kernel 0.3 or newer, which is not here: `pip install liger-kernel`; or "
            "leave it out."
        )
    _check_chat_template(getattr(args, "chat_template_path", None))


def _check_optimizer(args: TrainingArguments) -> None:
    name = OptimizerNames(args.optim).value
    try:
        _optimizer_settings(args, None)
    except (ImportError, ValueError) as error:
        if "need to pass a" in str(error):  # it wants to see the model first
            return
        raise type(error)(
            f"optim={name!r} cannot be used here: {str(error).rstrip('.')}; or choose another optim."
        ) from error
    if args.optim_args:
        _check_optim_args(args, name)


def _check_optim_args(args: TrainingArguments, optim: str) -> None:
    """Raises at the first setting that the optimizer does not read: most read a few, and AdamW none."""
    given = f"optim_args={args.optim_args!r}"
    entries = str(args.optim_args).replace(" ", "").split(",")
    for entry in entries:
        if not all(entry.partition("=")) or entry.count("=") > 1:
            raise ValueError(f"{given}: {entry!r} is no setting; write name=value, with commas between several.")
    for name in (entry.partition("=")[0] for entry in entries):
        if not _is_read(args, name):
            raise ValueError(
                f"{given}: optim={optim!r} does not read {name!r}; leave it out, or choose another optim."
            )
    try:
        _optimizer_settings(args, args.optim_args)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{given} cannot be read by optim={optim!r}: {error}; correct it.") from error


def _is_read(args: TrainingArguments, name: str) -> bool:
    """Whether an optimizer is made otherwise with a setting than without; the value that is given may be a default."""
    try:
        return any(_optimizer_settings(args, f"{name}={value}") != _optimizer_settings(args, None) for value in (0, 1))
    except (AttributeError, ValueError):  # it is read, and is no number
        return True


def _optimizer_settings(args: TrainingArguments, optim_args: str | None) -> Any:
    asked = copy.copy(args)
    asked.optim_args = optim_args
    return Trainer.get_optimizer_cls_and_kwargs(asked)


def _check_scheduler(args: TrainingArguments) -> None:
    """Makes the scheduler for one number: some need settings that only `lr_scheduler_kwargs` gives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    num_steps = max(1, args.max_steps)
    kwargs: Any = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(num_steps),
            num_steps,
            scheduler_specific_kwargs=kwargs or None,
        )
    except (TypeError, ValueError) as error:
        name = SchedulerType(args.lr_scheduler_type).value
        raise ValueError(
            f"lr_scheduler_type={name!r} cannot be made with lr_scheduler_kwargs={kwargs}: "
            f"{str(error).rstrip('.')}; give what it needs there, or choose another."
        ) from error


def _check_trackers(args: TrainingArguments) -> None:
    """Makes the callback of each tracker, as the trainer will: it says whether its package is here."""
    for name in args.report_to or ():
        try:
            for make in get_reporting_integration_callbacks([name]):
                make()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"report_to={name!r} cannot be used here: {str(error).rstrip('.')}; or choose another, or 'none'."
            ) from error


def _check_chat_template(path: str | None) -> None:
    """Raises if a template's file is not there, which would be looked for as a model on the hub."""
    if path is None or Path(path).is_dir():
        return
    is_template = path.endswith((".jinja", ".j2"))
    if not Path(path).is_file():
        if is_template or path.startswith(("/", ".", "~")):
            raise ValueError(f"chat_template_path={path!r}: there is no such file; check the path.")
    elif not is_template:
        raise ValueError(
            f"chat_template_path={path!r} is not taken for a template; give a file whose name ends in .jinja or .j2, "
            "or a tokenizer's folder or id."
        )


def check_own_optimizer(args: Any, optimizer: Any, scheduler: Any) -> None:
    """Raises if rates are asked for that only an optimizer and a scheduler of the trainer's making have.

    Args:
        args: Training arguments.
        optimizer: The user's own, if there is one.
        scheduler: Likewise.

    Raises:
        ValueError: If an option has no effect; the message names it.
    """
    if args.early_learning_rate is not None and optimizer is not None:
        raise ValueError(
            f"early_learning_rate={args.early_learning_rate} has no effect on an optimizer of your own; give the "
            "early blocks a parameter group with that rate, and leave early_learning_rate unset."
        )
    if args.reach_rate != "none" and optimizer is not None:
        raise ValueError(
            f"reach_rate={args.reach_rate!r} has no effect on an optimizer of your own; give the blocks parameter "
            "groups with the rates that you want, and set reach_rate to 'none'."
        )
    if args.reach_anneal and (optimizer is not None or scheduler is not None):
        raise ValueError(
            "reach_anneal=True has no effect on an optimizer or a scheduler of your own; let the trainer make "
            "both, or set it to False."
        )


def check_heads_step(optim: str, heads: nn.Module) -> None:
    """Raises if an optimizer never steps the heads: LOMO's steps what it finds in the model while it trains.

    Raises:
        ValueError: With the fix.
    """
    if optim in LOMO and any(parameter.requires_grad for parameter in heads.parameters()):
        raise ValueError(
            f"optim={optim!r} steps the model's own parameters alone, and the early blocks' heads would stay as they "
            "were drawn; choose another optim, or an objective without heads, such as local_objective='none'."
        )


def check_neftune(args: Any, learner: LocalLearner) -> None:
    """Raises if NEFTune's noise is asked for, and the model's first block learns from images too.

    Raises:
        ValueError: With the fix.
    """
    if args.neftune_noise_alpha is not None and learner.vision_parameters():
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} is not supported for a vision-language model, whose "
            "first block would learn to keep the noise; leave it out."
        )


def check_finite(name: str, value: float, step: int, args: Any) -> None:
    """Raises if a figure of a step is no number, before the step changes weights.

    Args:
        name: What it is, for the message.
        value: The figure.
        step: The optimizer step, counted from 1.
        args: Training arguments.

    Raises:
        FloatingPointError: With the fix.
    """
    if not math.isfinite(value):
        weights = "weights that have not stepped yet" if args.local_step else "weights"
        raise FloatingPointError(
            f"{name} is {value} at step {step}. Training stops before this step changes the {weights}; the "
            f"checkpoints in output_dir={args.output_dir!r} are from before. Resuming would go on at their rates: "
            "start a new run, from one of them as model if you like, with a lower learning_rate or "
            "early_learning_rate, or with more warmup_steps."
        )


def check_fsdp(trainer: Any) -> None:
    """Raises if FSDP is set up in a way that local learning does not work with.

    Raises:
        ValueError: With the fix.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing=True runs the decoder layers' hooks a second time in the backward; set it "
            "to false and use activation_checkpointing=True, which does not."
        )
    is_readout = vars(trainer.args).get("local_objective") == "readout"
    if plugin is not None and plugin.cpu_ram_efficient_loading and is_readout:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading=True loads the weights in one process, but local_objective='readout' "
            "reads through a copy of the norm and head that each has loaded; set it to false."
        )
    if plugin is not None and plugin.fsdp_version == 1 and trainer.args.clip_scope != "global":
        raise ValueError(
            f"clip_scope={trainer.args.clip_scope!r} needs FSDP2; set fsdp_version to 2, or clip_scope to 'global'."
        )


def check_dataset(dataset: Any, layouts: Sequence[Set[str]], advice: str = "") -> None:
    """Raises if a training set is empty, or has no column layout that the trainer reads.

    Args:
        dataset: The training set; what is no data set is left to the trainer, which says what is wrong with it.
        layouts: Sets of columns, one of which there must be. None: any columns will do.
        advice: What else than renaming the columns helps.

    Raises:
        ValueError: If it has no rows, or none of the layouts.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    if next(iter(dataset), None) is None:
        raise ValueError("train_dataset has no rows; check the file or split it was loaded from.")
    if not layouts:
        return
    columns = get_dataset_column_names(dataset)
    if not any(layout <= set(columns) for layout in layouts):
        known = "; ".join(" + ".join(sorted(layout)) for layout in layouts)
        raise ValueError(
            f"train_dataset has the columns {sorted(columns)} but none of the layouts to train on ({known}); "
            f"rename the columns{advice and ', '}{advice}."
        )


def check_sft_dataset(dataset: Any, args: SFTConfig, formatting_func: Any = None) -> None:
    """Raises if a training set is empty or, unless its preparation is skipped, has no column that `SFTTrainer` reads.

    Raises:
        ValueError: If it has no rows, or none of the column layouts.
    """
    dataset_kwargs: Any = args.dataset_kwargs or {}
    is_prepared = formatting_func is not None or dataset_kwargs.get("skip_prepare_dataset")
    layouts = () if is_prepared else ({args.dataset_text_field}, *_SFT_LAYOUTS)
    check_dataset(dataset, layouts, "set dataset_text_field, or pass a formatting_func")


def check_questions(dataset: Any, args: GRPOConfig) -> None:
    """Raises if there are fewer questions than a generation takes: TRL's sampler would then yield nothing at all.

    Raises:
        ValueError: Names both numbers.
    """
    assert args.generation_batch_size is not None and args.num_generations is not None
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"train_dataset has {len(dataset)} questions, fewer than the {needed} of a generation "
            f"(generation_batch_size={args.generation_batch_size} / num_generations={args.num_generations}): no step "
            "would be trained; give more questions, or lower gradient_accumulation_steps or "
            "per_device_train_batch_size."
        )


def check_rewards(reward_funcs: Any, dataset: Any) -> None:
    """Raises if a reward function cannot be called on the training set's rows: otherwise found after generating.

    Args:
        reward_funcs: A reward or a list of them; models and their ids are left to the trainer.
        dataset: The training set.

    Raises:
        ValueError: If a function needs what it is not given, or does not take what it is given.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    columns = [name for name in get_dataset_column_names(dataset) if name not in _RENAMED_COLUMNS]
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            continue
        signature = inspect.signature(function)
        environments = {"environments"} & signature.parameters.keys()  # given where there are some
        try:
            signature.bind(**dict.fromkeys([*_REWARD_ARGUMENTS, *columns, *environments]))
        except TypeError as error:
            raise ValueError(
                f"reward_funcs={function.__name__}: {error}. It is called with {', '.join(_REWARD_ARGUMENTS)} and the "
                f"training set's columns ({', '.join(columns) or 'none'}) by name; rename the columns, or let it take "
                "**kwargs."
            ) from error


def check_model(
    model: str | PreTrainedModel | PeftModel, args: Any, peft_config: Any, quantization_config: Any
) -> None:
    """Raises if a model cannot be cut into the blocks that are asked for, for a model id from its config alone.

    Raises:
        ValueError: If it is no decoder-only language model, has too few layers for the cut, or is quantised without
            an adapter to train; or if the arguments are of no method.
        OSError: If there is no such model here or on the hub.
    """
    _check_method(args)
    if isinstance(model, str):
        config = load_config(model, args)
        given = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
        quantized = given is not None or is_quantized(config)
        _check_config(model, config)
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
    else:
        base_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        quantized = is_quantized(base_model.config)
        num_layers = len(find_decoder_stack(base_model).layers)
    _check_adapter(model, peft_config)
    split_layers(num_layers, args.num_blocks, args.split_at)
    name = model if isinstance(model, str) else type(model).__name__
    check_trainable(name, quantized, has_adapter=peft_config is not None or isinstance(model, PeftModel))


def _check_method(args: object) -> None:
    if not isinstance(args, LocalArguments):
        kind = None if args is None else type(args).__name__
        raise ValueError(
            f"args={kind} has no arguments of a method; pass a config that has, such as LoPTConfig, LoPTDPOConfig or "
            "LoPTGRPOConfig."
        )


def load_config(model: str, args: Any) -> PretrainedConfig:
    """Loads the configuration of the model that TRL's trainer will load from a model id.

    Raises:
        OSError: If there is no such model here or on the hub.
    """
    kwargs: Any = args.model_init_kwargs or {}
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    except OSError as error:  # which does not always name the model
        raise OSError(f"model={model!r} cannot be loaded: {error}") from error
    return config


def _check_adapter(model: Any, peft_config: Any) -> None:
    configs = [peft_config, *(model.peft_config.values() if isinstance(model, PeftModel) else [])]
    if any(isinstance(config, PrefixTuningConfig) for config in configs):
        raise ValueError(
            "peft_config=PrefixTuningConfig cannot be trained locally: one encoder feeds the prefixes of all blocks; "
            "use LoRA or another adapter inside the layers."
        )


def _check_config(name: str, config: PretrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ValueError(f"model={name} is an encoder-decoder; local learning needs a decoder-only language model.")
    check_architecture(name, config.get_text_config(decoder=True))
