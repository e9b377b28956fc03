"""Supervised fine-tuning in a pipeline of local learners (PPLL): one process per stage, no bubble.

```bash
lopt-hf pipeline --config recipes/smollm2-135m/pipeline/ppll_2.yaml          # all stages on this host
lopt-hf pipeline --config recipes/smollm2-135m/pipeline/ppll_mlaan_2.yaml    # early blocks learn by MLAAN
lopt-hf pipeline --method mlaan --help                                        # the options of that method
accelerate launch --multi_gpu --num_processes 2 -m lopt_hf.scripts.pipeline --config ...
lopt-hf pipeline export --checkpoint out/checkpoint-100 --output-dir model    # a checkpoint as a stock model
lopt-hf pipeline simulate --help                                              # schedules compared, without a model
```

Launched by `accelerate launch`, a process is one stage; otherwise the command starts all stages on this host.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
import yaml
from transformers import AutoConfig
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from lopt_hf.data.pretrained import resolve_model
from lopt_hf.local.blocks import split_layers
from lopt_hf.pipeline.runtime.adapters import add_adapter
from lopt_hf.pipeline.runtime.config import PipelineArguments, PipelineConfig
from lopt_hf.pipeline.runtime.health import PipelineError, report_failure, report_termination
from lopt_hf.pipeline.runtime.launch import PipelineWorld, Rendezvous, describe, join, launch_command
from lopt_hf.pipeline.runtime.mlaan import MLAANPipelineConfig, MLAANPipelineTrainer, with_auxiliaries
from lopt_hf.pipeline.runtime.runner import PipelineMixin, PipelineTrainer
from lopt_hf.pipeline.runtime.stage import plan_stages
from lopt_hf.pipeline.split.balance import balanced_split, format_split
from lopt_hf.pipeline.split.costs import measure_costs
from lopt_hf.scripts import pipeline_export, pipeline_simulate
from lopt_hf.scripts.parsing import make_trl_parser, parse_or_exit
from lopt_hf.scripts.sft import SFTDataArguments, load_split
from lopt_hf.scripts.training import draw, resumed_checkpoint

__all__ = ["main", "make_parser", "run_stage"]

# Starts of the names of arguments that may differ from host to host, or that only one process reads.
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


StageConfig = PipelineConfig | MLAANPipelineConfig

SUBCOMMANDS = {"simulate": pipeline_simulate.main, "export": pipeline_export.main}


@dataclass
class LaunchArguments:
    """By which method the early blocks learn, and how `lopt-hf pipeline` starts the stages on this host.

    Parameters:
        method: `"lopt"` or `"mlaan"`; each has options of its own.
        devices: Ids of the accelerators to use.
    """

    method: str = field(
        default="lopt",
        metadata={
            "help": "'lopt', or 'mlaan', whose options `--method mlaan --help` shows.",
            "choices": ["lopt", "mlaan"],
        },
    )
    devices: str | None = field(
        default=None, metadata={"help": "Ids of the accelerators of this host to use, such as 0,1. Default: all."}
    )


def make_parser(method: str = "lopt") -> TrlParser:
    """The parser of this command: data, training, model and launch arguments, and `--config file.yaml`.

    Args:
        method: Whose training arguments.
    """
    config_class = MLAANPipelineConfig if method == "mlaan" else PipelineConfig
    return make_trl_parser("pipeline", __doc__, SFTDataArguments, config_class, ModelConfig, LaunchArguments)


def chosen_method(arguments: Sequence[str]) -> str:
    """The method that a command line names, or the YAML that it names: its options are parsed by it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method")
    parser.add_argument("--config")
    with contextlib.suppress(argparse.ArgumentError):  # the whole parser says what is wrong
        given, _ = parser.parse_known_args(arguments)
        if given.method is None and given.config is not None and os.path.isfile(given.config):
            with contextlib.suppress(yaml.YAMLError), open(given.config, encoding="utf-8") as file:
                settings = yaml.safe_load(file)
                given.method = settings.get("method") if isinstance(settings, dict) else None
        return given.method or "lopt"
    return "lopt"


def make_trainer(
    data_args: SFTDataArguments, args: StageConfig, model_args: ModelConfig, world: PipelineWorld
) -> PipelineMixin:
    """Loads this stage's part of the model and builds its trainer."""
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing; give a hub id or a local folder.")
    if get_quantization_config(model_args) is not None:
        raise ValueError("load_in_4bit and load_in_8bit do not work in a pipeline yet; leave them out.")
    checkpoint = resolve_model(model_args.model_name_or_path)
    overrides: Any = args.model_init_kwargs or {}
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **overrides,
    }
    config = AutoConfig.from_pretrained(checkpoint, revision=model_args.model_revision)
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    if args.split == "auto" and args.split_at is None:
        args.split_at = measured_split(checkpoint, args, model_args, world)
    plans = plan_stages(split_layers(num_layers, args.num_blocks, args.split_at), world.num_stages)
    plan = plans[world.stage]
    if world.rank == 0:
        print("\n".join(str(plan) for plan in plans))
    trainer_class: Any = MLAANPipelineTrainer if isinstance(args, MLAANPipelineConfig) else PipelineTrainer
    model: Any = trainer_class.load_part(checkpoint, plan, args, **kwargs)
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        model = add_adapter(model, peft_config, args.seed)
    train_dataset = load_split(data_args, data_args.dataset_train_split, args.seed)
    train_dataset = draw(train_dataset, data_args.dataset_max_samples, args.seed)
    trainer: PipelineMixin = trainer_class(model, args, world=world, train_dataset=train_dataset)
    return trainer


def measured_split(checkpoint: str, args: StageConfig, model_args: ModelConfig, world: PipelineWorld) -> list[int]:
    """Where to cut so that the slowest block is as fast as can be; one process measures, and all take its cut."""
    if world.rank == 0:
        costs = measure_costs(
            checkpoint,
            args.per_device_train_batch_size,
            args.max_length or 1024,  # TRL's default length
            objective="readout" if isinstance(args, MLAANPipelineConfig) else args.local_objective,
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            device=args.device,
            accumulation_steps=args.gradient_accumulation_steps,
            activation_checkpointing=bool(args.activation_checkpointing),
            tied_embeddings=args.tied_embeddings,
            peft_config=get_peft_config(model_args),
        )
        if isinstance(args, MLAANPipelineConfig):
            costs = with_auxiliaries(costs, args)
        split = balanced_split(costs, args.num_blocks)
        print(format_split(costs, split), flush=True)
        world.store.set("split_at", json.dumps(split))
    return list(json.loads(world.store.get("split_at")))


def shared_settings(args: PipelineArguments, model_args: ModelConfig) -> dict[str, str]:
    """What must be the same on all processes, by name: all that is not about a host."""
    values = [(f.name, getattr(group, f.name)) for group in (args, model_args) for f in fields(group)]
    return {name: str(value) for name, value in values if not name.startswith(_OF_A_HOST)}


def run_stage(data_args: SFTDataArguments, args: StageConfig, model_args: ModelConfig, rendezvous: Rendezvous) -> None:
    """Trains one stage to the end and saves the model with the others."""
    assert args.num_stages is not None
    world = join(
        rendezvous,
        args.num_stages,
        args.data_parallel,
        args.device.type,
        args.peer_timeout,
        args.start_timeout,
        shared_settings(args, model_args),
    )
    name = describe(world.rank, world.num_replicas)
    report_termination(world.monitor, name)
    try:
        trainer = make_trainer(data_args, args, model_args, world)
        trainer.train(resume_from_checkpoint=resumed_checkpoint(args))
        trainer.save_model(args.output_dir)
        if args.push_to_hub and world.reports:
            trainer.push_model()
        world.monitor.meet(world.store, "end", world.mesh.size())  # the store's host leaves last
    except PipelineError:
        raise
    except Exception as error:
        raise world.monitor.explain(error, name) from error
    world.monitor.finish()
    dist.destroy_process_group()
    if world.reports:
        print(f"Model saved to {args.output_dir}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one stage, or starts all of them on this host.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in SUBCOMMANDS:
        return SUBCOMMANDS[arguments[0]](arguments[1:])
    if "RANK" not in os.environ:
        _, args, _, launch_args = parse_or_exit(make_parser(chosen_method(arguments)), arguments)
        sys.exit(_launch(args, launch_args, arguments))
    try:
        rendezvous = Rendezvous.from_environment()
    except ValueError as error:
        sys.exit(f"lopt-hf pipeline: {error}")
    try:
        data_args, args, model_args, _ = parse_or_exit(make_parser(chosen_method(arguments)), arguments)
        run_stage(data_args, args, model_args, rendezvous)
    except SystemExit as error:
        if error.code:
            report_failure(rendezvous.store, f"rank {rendezvous.rank} was given wrong arguments; see its own output")
        raise
    except ValueError as error:
        reason = report_failure(rendezvous.store, f"rank {rendezvous.rank} failed: {error}")
        sys.exit(f"lopt-hf pipeline: rank {rendezvous.rank} stops: {reason}")
    except PipelineError:
        sys.exit(1)  # the monitor has said why


def _launch(args: PipelineArguments, launch_args: LaunchArguments, arguments: Sequence[str]) -> int:
    assert args.num_stages is not None
    options = [] if launch_args.devices is None else ["--gpu_ids", launch_args.devices]
    command = launch_command(args.num_stages * args.data_parallel, arguments, options)
    # In a session of its own, so that a signal reaches the launcher once: it ends the stages, and must be let do so.
    launcher = subprocess.Popen(command, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: launcher.send_signal(number))
    code = launcher.wait()
    if code != 0:
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


if __name__ == "__main__":
    main()
