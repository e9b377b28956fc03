"""Which engine shards a model: the one that a run asks for, and the one that accelerate then takes."""

from accelerate import Accelerator, DistributedType
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

__all__ = ["asked_engine", "engine_of", "fallback_warning"]


def asked_engine(args: TrainingArguments) -> str | None:
    """Returns `"FSDP"` or `"DeepSpeed"` if a run is to shard the model, as its arguments or `accelerate launch` say.

    It is known before anything is set up, and what a run is checked for; what it gets, `engine_of` tells.
    """
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    return None


def engine_of(accelerator: Accelerator) -> str | None:
    """Returns the engine that shards the model: `"FSDP"`, `"DeepSpeed"`, or None for one process and DDP."""
    engines = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
    return engines.get(accelerator.distributed_type)


def fallback_warning(accelerator: Accelerator, asked: str | None) -> str | None:
    """Returns what to say where accelerate took another engine than it was asked for, which it does without a word."""
    if asked is None or engine_of(accelerator) is not None:
        return None
    processes = accelerator.num_processes
    instead = f"DDP on {processes} processes" if processes > 1 else "one process"
    return (
        f"{asked} was asked for, but accelerate runs {instead} on {accelerator.device.type}: nothing is sharded, and "
        "every process holds the whole model. accelerate shards where `accelerate launch` starts it on a machine with "
        "an accelerator, unless use_cpu is set."
    )
