"""Which engine shards a model: the one that a run asks for, and the one that accelerate then takes."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from transformers import TrainingArguments

from lopt_hf.common.upstream.fsdp import forward_goes_on
from lopt_hf.local.heads import LocalHeads

__all__ = ["asked_engine", "engine_of", "fallback_warning", "root_kept_whole", "shard_heads_apart"]


def asked_engine(args: TrainingArguments) -> str | None:
    """Returns `"FSDP2"`, `"FSDP1"` or `"DeepSpeed"` if a run is to shard, as its arguments or `accelerate launch` say.

    It is known before anything is set up, and what a run is checked for; what it gets, `engine_of` tells.
    """
    if args.fsdp:
        return f"FSDP{_version_in(args.fsdp_config)}"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"  # as accelerate's plugin
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    return None


def _version_in(fsdp_config: Any) -> int:
    """The version of FSDP that transformers' arguments ask for, by default 2."""
    config = fsdp_config or {}
    if isinstance(config, str):
        config = json.loads(config if config.startswith("{") else Path(config).read_text(encoding="utf-8"))
    return int(config.get("version", config.get("fsdp_version", 2)))


def engine_of(accelerator: Accelerator) -> str | None:
    """Returns the engine that shards the model, as `RunFacts.engine` names it; None for one process and DDP."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "DeepSpeed"
    if accelerator.distributed_type != DistributedType.FSDP:
        return None
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.auto_wrap_policy
    if plugin.fsdp_version == 2 and getattr(policy, "func", policy) is not transformer_auto_wrap_policy:
        # Layers must be units of their own, and the heads: what is left to the root is whole for a part of a step.
        return f"FSDP2 with {_named(getattr(policy, 'func', policy))}"
    return f"FSDP{plugin.fsdp_version}"


def _named(policy: Any) -> str:
    """What an FSDP plugin calls a wrap policy that is not by the layers' class."""
    if policy is None:
        return "NO_WRAP"
    return "SIZE_BASED_WRAP" if policy is size_based_auto_wrap_policy else "an auto_wrap_policy of your own"


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


def shard_heads_apart(accelerator: Accelerator, model: nn.Module, heads: LocalHeads) -> None:
    """Lets FSDP2 make each local head a unit of its own, beside the decoder's layers.

    In the root's unit a head would be whole while the root's forward goes on, and its gradient not where it is read.

    Args:
        accelerator: What is going to shard the model.
        model: The model, of which the heads are a part; PEFT-wrapped or not.
        heads: The heads.

    Raises:
        ValueError: If a head's class is also that of other modules, which would become units with it.
    """
    plugin = accelerator.state.fsdp_plugin
    own = {type(head).__name__ for head in heads.values() if next(head.parameters(), None) is not None}
    others = {type(module).__name__ for name, module in model.named_modules() if not heads.is_name_of_head(name)}
    if own & others:
        raise ValueError(
            f"local_objective: its head is a {min(own & others)}, as other modules of the model are, and FSDP2 shards "
            "by class; give the head a class of its own, or set local_backward to 'joint' and task_reach to 1."
        )
    names = plugin.transformer_cls_names_to_wrap
    if names is None:
        no_split: Any = model._no_split_modules
        names = list(no_split or [])
    plugin.transformer_cls_names_to_wrap = [*names, *sorted(own - set(names))]


@contextmanager
def root_kept_whole(model: nn.Module) -> Iterator[None]:
    """Makes a context for a backward within the forward of a model that FSDP2 shards.

    The end of a backward shards the root's own parameters again, which the rest of the root's forward still needs, and
    takes that forward for ended.
    """
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(False, recurse=False)
    try:
        with forward_goes_on(model):
            yield
    finally:
        model.set_reshard_after_backward(True, recurse=False)
