"""A run of the pipeline: all stages launched on this host, and one stage from its arguments to the saved model."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_quantization_config

from lopt_hf.common.adapters import adapter_config
from lopt_hf.common.arithmetic import arithmetic_of
from lopt_hf.common.launching import run_launcher
from lopt_hf.common.resuming import find_checkpoint
from lopt_hf.common.upstream.trainers import TRAINER_STATE_NAME
from lopt_hf.data.prepared import check_prepared, say_what_was_cut
from lopt_hf.data.pretrained import resolve_model
from lopt_hf.local.blocks import split_layers
from lopt_hf.pipeline.runtime.adapters import add_adapter
from lopt_hf.pipeline.runtime.arguments import PipelineArguments
from lopt_hf.pipeline.runtime.checkpoint import Manifest
from lopt_hf.pipeline.runtime.config import MLAANPipelineConfig, PipelineConfig
from lopt_hf.pipeline.runtime.health import BAD_INPUT_STATUS, PipelineError, report_bad_input, report_termination
from lopt_hf.pipeline.runtime.launch import PipelineWorld, Rendezvous, init_world, launch_command, rank_name
from lopt_hf.pipeline.runtime.stage import read_config
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from lopt_hf.pipeline.runtime.stage_trainer import StageMixin
from lopt_hf.pipeline.runtime.trainer import MLAANPipelineTrainer, PipelineTrainer, StageTrainer
from lopt_hf.pipeline.split.auxiliaries import with_auxiliaries
from lopt_hf.pipeline.split.balance import balanced_split, format_split
from lopt_hf.pipeline.split.costs import measure_costs

__all__ = ["StageConfig", "agreed_split", "find_model", "launch_stages", "make_trainer", "model_kwargs", "run_stage"]

StageConfig = PipelineConfig | MLAANPipelineConfig
# Makes a stage's trainer of training and model arguments, the processes, and what loads the data
MakeTrainer = Callable[[Any, Any, PipelineWorld, Callable[[], Any]], StageMixin]

# Prefixes of the names of arguments that may differ from host to host, or that only one process reads
_OF_A_HOST = (
    "output_dir",
    "resume_from_checkpoint",  # its meaning is compared when the checkpoint is looked for
    "model_name_or_path",
    "chat_template_path",
    "dataset_num_proc",
    "dataloader_",
    "use_cpu",
    "local_rank",
    "log_level",
    "log_on_each_node",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "trackio_",
    "hub_",
    "push_to_hub",
)


def find_model(args: StageConfig, model_args: ModelConfig) -> tuple[str, int]:
    """Finds the model and checks, without loading it, that it can be cut into the stages.

    Args:
        args: Training arguments.
        model_args: Which model.

    Returns:
        Its folder or id, and the number of its layers.

    Raises:
        ValueError: If the model is missing, is to be quantised or resized, or has too few layers.
        OSError: If it cannot be found.
    """
    template = args.chat_template_path
    if template is not None and not (os.path.isfile(template) and template.endswith((".jinja", ".j2"))):
        raise ValueError(
            f"chat_template_path={template!r} would add tokens to embeddings and LM head, which are on two stages; "
            "name a .jinja file that holds the template alone, or start from a model that has these tokens."
        )
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing; give a hub id or a local folder.")
    if get_quantization_config(model_args) is not None:
        raise ValueError("load_in_4bit and load_in_8bit do not work in a pipeline yet; leave them out.")
    checkpoint = resolve_model(model_args.model_name_or_path)
    config, _ = read_config(checkpoint, **model_kwargs(args, model_args))
    num_layers = int(config.get_text_config(decoder=True).num_hidden_layers)
    split_layers(num_layers, args.num_blocks, args.split_at)
    return checkpoint, num_layers


def model_kwargs(args: StageConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Returns what `from_pretrained` is given; some of it changes options of the config (`read_config`).

    Args:
        args: Training arguments.
        model_args: Which model.
    """
    overrides: Any = args.model_init_kwargs or {}
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **overrides,
    }


def make_trainer(
    args: StageConfig, model_args: ModelConfig, world: PipelineWorld, load_dataset: Callable[[], Any]
) -> StageTrainer:
    """Loads this stage's part of the model and builds its trainer.

    Args:
        args: Training arguments.
        model_args: Which model, and its adapter.
        world: The processes of the run.
        load_dataset: Loads the training set; called once the model is there.

    Raises:
        ValueError: If the model or the data cannot be trained on.
    """
    checkpoint, num_layers = find_model(args, model_args)
    kwargs = model_kwargs(args, model_args)
    if args.split == "auto" and args.split_at is None:
        args.split_at = agreed_split(args, world, partial(_find_split, checkpoint, args, model_args))
    plans = plan_stages(split_layers(num_layers, args.num_blocks, args.split_at), world.num_stages)
    plan = plans[world.stage]
    if world.rank == 0:
        print("\n".join(str(plan) for plan in plans))
    trainer_class: Any = MLAANPipelineTrainer if isinstance(args, MLAANPipelineConfig) else PipelineTrainer
    model: Any = trainer_class.load_part(checkpoint, plan, args, **kwargs)
    peft_config = adapter_config(model_args)
    if peft_config is not None:
        model = add_adapter(model, peft_config, args.seed)
    if world.rank == 0:
        weights = str(model.dtype).removeprefix("torch.")
        print(arithmetic_of(str(args.mixed_precision), weights, args.device.type), flush=True)
    rows = load_dataset()
    trainer: StageTrainer = trainer_class(model, args, world=world, train_dataset=rows)
    trainer.model_revision = kwargs["revision"]
    if world.reports and not args.packing:
        say_what_was_cut(rows, trainer.train_dataset, args.max_length)
    check_prepared(trainer.train_dataset, args)
    return trainer


def agreed_split(args: PipelineArguments, world: PipelineWorld, find: Callable[[], list[int]]) -> list[int]:
    """Finds the cut whose slowest block is the fastest; one process measures, and all take its cut.

    A run that goes on keeps its checkpoint's: measured anew, it could come out otherwise.

    Args:
        args: Training arguments.
        world: The processes of the run.
        find: Measures, and returns the first layers of all blocks but the first.
    """
    if world.rank == 0:
        split = _resumed_split(args)
        if split is None:
            split = find()
        world.store.set("split_at", json.dumps(split))
    return list(json.loads(world.store.get("split_at")))


def _resumed_split(args: PipelineArguments) -> list[int] | None:
    folder = find_checkpoint(str(args.output_dir), args.resume_from_checkpoint)
    if folder is None:
        return None
    split: list[int] = Manifest(folder).content["split_at"]
    if len(split) != args.num_blocks - 1:  # which is refused when the checkpoint is read
        return None
    print(f"split_at={split}, as in {folder}", flush=True)
    return split


def _find_split(checkpoint: str, args: StageConfig, model_args: ModelConfig) -> list[int]:
    costs = measure_costs(
        read_config(checkpoint, **model_kwargs(args, model_args))[0],
        args.per_device_train_batch_size,
        args.max_length or 1024,  # TRL's default length
        objective=_measured_objective(args),
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        device=args.device,
        accumulation_steps=args.gradient_accumulation_steps,
        activation_checkpointing=bool(args.activation_checkpointing),
        tied_embeddings=args.tied_embeddings,
        peft_config=adapter_config(model_args),
    )
    if isinstance(args, MLAANPipelineConfig):
        costs = with_auxiliaries(costs, args)
    costs = costs.with_gradient(args.gradient, args.gradient_recompute, args.schedule.cycle)
    split = balanced_split(costs, args.num_blocks)
    print(format_split(costs, split), flush=True)
    return split


def _measured_objective(args: StageConfig) -> str:
    if isinstance(args, MLAANPipelineConfig):
        return "readout"
    return "reconstruction" if args.local_objective == "none" else args.local_objective


def _settings_of_all(args: PipelineArguments, model_args: Any) -> dict[str, str]:
    """Returns the arguments that all processes must share, as text by name: those that are not about a host."""
    values = [(f.name, getattr(group, f.name)) for group in (args, model_args) for f in fields(group)]
    return {name: str(value) for name, value in values if not name.startswith(_OF_A_HOST)}


def run_stage(
    args: PipelineArguments,
    model_args: Any,
    rendezvous: Rendezvous,
    load_dataset: Callable[[], Any],
    make: MakeTrainer = make_trainer,
) -> bool:
    """Trains one stage to the end and saves the model together with the others.

    Args:
        args: Training arguments.
        model_args: Which model, and its adapter; a dataclass.
        rendezvous: This process's place among the launched ones.
        load_dataset: Loads the training set.
        make: Makes the trainer.

    Returns:
        Whether this process is the one that tells the user how the run goes.

    Raises:
        ValueError: If the processes were given different arguments, or another number of them was launched.
        PipelineError: If this stage or another fails; all have been told.
    """
    assert args.num_stages is not None
    world = init_world(
        rendezvous,
        args.num_stages,
        args.data_parallel,
        args.device.type,
        args.peer_timeout,
        args.start_timeout,
        _settings_of_all(args, model_args),
        args.sends_gradients_back,
    )
    name = rank_name(world.rank, world.num_replicas)
    report_termination(world.monitor, name)
    try:
        trainer = _make_or_report(make, args, model_args, world, load_dataset)
        trainer.train(resume_from_checkpoint=find_checkpoint(str(args.output_dir), args.resume_from_checkpoint))
        trainer.save_model(args.output_dir)
        if world.reports:  # what was logged: `lopt-hf curves` draws it
            trainer.state.save_to_json(os.path.join(str(args.output_dir), TRAINER_STATE_NAME))
        if args.push_to_hub and world.reports:
            trainer.push_model()
        world.monitor.barrier(world.store, "end", world.mesh.size())  # the store's host leaves last
    except PipelineError:
        raise
    except Exception as error:
        raise world.monitor.explain(error, name) from error
    world.monitor.finish()
    dist.destroy_process_group()
    if world.reports:
        print(f"Model saved to {args.output_dir}")
    return world.reports


def _make_or_report(
    make: MakeTrainer, args: PipelineArguments, model_args: Any, world: PipelineWorld, load_dataset: Callable[[], Any]
) -> StageMixin:
    try:
        return make(args, model_args, world, load_dataset)
    except (ValueError, OSError, ImportError):
        report_bad_input(world.store)
        raise


def launch_stages(
    args: PipelineArguments,
    arguments: Sequence[str],
    devices: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Starts all stages on this host by `accelerate launch`, and waits for them.

    Args:
        args: Training arguments.
        arguments: The command line that each stage is given.
        devices: Ids of the accelerators to use, such as `0,1`. Default: all.
        environment: Variables that the stages are given.

    Returns:
        The launcher's exit status.
    """
    assert args.num_stages is not None
    options = [] if devices is None else ["--gpu_ids", devices]
    command = launch_command(args.num_stages * args.data_parallel, arguments, options)
    code = run_launcher(command, environment)
    if code not in (0, BAD_INPUT_STATUS):
        print(_how_to_go_on(args), file=sys.stderr)
    return code


def _how_to_go_on(args: PipelineArguments) -> str:
    output_dir = str(args.output_dir)
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    found = "no checkpoint was saved" if last is None else f"the last checkpoint is {last}"
    return (
        f"lopt-hf pipeline: the run has not ended; {found}. The same command with --resume_from_checkpoint auto "
        f"{'starts anew' if last is None else 'goes on from it'}."
    )
