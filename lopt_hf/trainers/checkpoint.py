"""Checkpoints that are whole or absent, and that resume local learning exactly."""

import contextlib
import functools
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import StateDictType
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from lopt_hf.common.files import publish_folder

__all__ = [
    "HEADS_FILE",
    "StagedCheckpoint",
    "check_files",
    "check_same_model",
    "complete_states",
    "fsdp_files",
    "fsdp_weights",
    "load_heads",
    "load_weights",
    "load_whole_state",
    "passed_over_weights",
    "random_state_warning",
    "read_json",
    "save_heads",
    "whole_state",
]

HEADS_FILE = "local_heads.safetensors"
# Optimizers that make the state of a parameter, at its first step, of zeros: also the number of its steps
_STARTS_AT_ZERO = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)
# What a config says that does not tell one model from another, or that training and saving set in it
_NOT_OF_A_MODEL = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "label2id", "problem_type", "torch_dtype"),
    *("transformers_version", "use_cache"),
)
STAGING_FOLDER = "incomplete-checkpoint"  # `get_last_checkpoint` does not match it


def read_json(path: Path, checkpoint: str) -> Any:
    """Reads a JSON file of a checkpoint.

    Raises:
        ValueError: If it is damaged; the message names checkpoint and file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of a byte that is no text
        raise _damaged(checkpoint, path.name, str(error)) from error


def _damaged(checkpoint: str, name: str, reason: str) -> ValueError:
    return ValueError(
        f"resume_from_checkpoint={checkpoint!r}: {name} is damaged ({reason}); go on from an earlier checkpoint."
    )


def check_files(checkpoint: str, names: Iterable[str], shapes: Mapping[str, torch.Size]) -> None:
    """Checks that a checkpoint has the files that a run goes on from, that they are whole, and of the run's model.

    Weights and state that are not there would begin anew, without a word. A file that ends too early is found by what
    stands at its end (`.pt`) or by the lengths at its start (`.safetensors`); nothing is read in full.

    Args:
        checkpoint: The checkpoint's folder.
        names: Files that must be there.
        shapes: The shapes of the model's tensors by their names in the checkpoint's weights.

    Raises:
        ValueError: If one is missing, is damaged, or has a tensor of another shape; the message names it.
    """
    folder = Path(checkpoint)
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} has no {name}, without which the run would go on otherwise "
                "than it was left; go on from a whole checkpoint, or pass the folder as `model` to start from its "
                "weights."
            )
        if path.suffix == ".pt" and not zipfile.is_zipfile(path):
            raise _damaged(checkpoint, name, "it ends too early")
        if path.suffix == ".json":
            read_json(path, checkpoint)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise _damaged(checkpoint, path.name, str(error)) from error
        other = next((name for name in found if shapes.get(name, found[name]) != found[name]), None)
        if other is not None:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is of another model: {other} is of shape {list(found[other])} "
                f"there and of {list(shapes[other])} in this run; pass the model that the run started from."
            )


def check_same_model(model: PreTrainedModel, checkpoint: str) -> None:
    """Checks that a checkpoint's model is built as this run's, by what its `config.json` says.

    Args:
        model: The run's model.
        checkpoint: The checkpoint's folder.

    Raises:
        ValueError: If it is another, or nothing says which; the message names what differs first.
    """
    path = Path(checkpoint) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} has no {CONFIG_NAME}, which says what model it is of; go on from "
            "a whole checkpoint."
        )
    content: dict[str, Any] = read_json(path, checkpoint)
    name = type(model).__name__
    (saved_name, *_) = content.get("architectures") or [name]
    if saved_name != name:  # whose config this one's class could not read
        there, here = {"architecture": saved_name}, {"architecture": name}
    else:
        there, here = _model_facts(type(model.config).from_dict(content)), _model_facts(model.config)
    other = next((fact for fact in (*here, *there) if here.get(fact) != there.get(fact)), None)
    if other is not None:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is of another model: {other} is {there.get(other)!r} there and "
            f"{here.get(other)!r} in this run; resume with the same settings, or start anew in another output_dir."
        )


def _model_facts(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says of its model, nested values by paths such as `repl.config.operator`."""
    values = json.loads(config.to_json_string(use_diff=False))  # so that both have lists and text as JSON has them
    told = {name: value for name, value in values.items() if name not in _NOT_OF_A_MODEL}
    return {"num_labels": config.num_labels, **_by_path(told)}


def _by_path(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _by_path(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def random_state_warning(checkpoint: str, args: TrainingArguments) -> str | None:
    """Returns what to say where a checkpoint has no random state of this process."""
    name = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
    if (Path(checkpoint) / name).is_file():
        return None
    return (
        f"resume_from_checkpoint={checkpoint!r} has no {name}, as when another number of processes wrote it: random "
        "numbers, such as dropout's, are not those of the run that was left."
    )


def passed_over_weights(model: PreTrainedModel, load_result: Any) -> bool:
    """Tells whether weights were passed over, as those are that are saved under other names.

    Args:
        model: The model.
        load_result: What its `load_state_dict(..., strict=False)` has returned.
    """
    missing = set(load_result.missing_keys)
    state = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
    is_lacking = any(state[name].data_ptr() not in loaded for name in missing)  # tied to none that was loaded
    return is_lacking or bool(load_result.unexpected_keys)


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Loads a checkpoint's weights as `from_pretrained` does.

    Mixtures of experts, most vision-language models, ViT and Swin are saved under the names that the hub has for them.
    `Trainer` does not translate these back: it loads what it finds by name, and goes on without the rest
    (https://github.com/huggingface/transformers/issues/48805).

    Args:
        model: The model, not PEFT-wrapped.
        checkpoint: The checkpoint's folder.

    Raises:
        ValueError: If a weight of the model is not there, if there is one besides, or if one is of another shape.
    """
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    widest = functools.reduce(torch.promote_types, dtypes)  # some are kept in fp32 beside bf16
    result: Any = type(model).from_pretrained(checkpoint, dtype=widest, output_loading_info=True)
    loaded, found = result
    missing = found["missing_keys"]
    if missing:
        raise ValueError(
            f"{checkpoint!r} lacks {len(missing)} weights of {type(model).__name__}, such as {min(missing)}; go on "
            "from another checkpoint, or from the model that the run started from."
        )
    shapes, others = ({n: tensor.shape for n, tensor in each.state_dict().items()} for each in (model, loaded))
    differing = {name for name, _ in shapes.items() ^ others.items()} | set(found["unexpected_keys"])
    if differing:
        raise ValueError(
            f"{checkpoint!r} is of another model: {len(differing)} of its weights are not those of this "
            f"{type(model).__name__}, such as {min(differing)}; go on from another checkpoint, or from the model that "
            "the run started from."
        )
    model.load_state_dict(loaded.state_dict())


def save_heads(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a learner's state into a checkpoint's folder."""
    save_file({name: value.contiguous() for name, value in state.items()}, folder / HEADS_FILE)


def load_heads(checkpoint: str) -> dict[str, torch.Tensor]:
    """Reads what `save_heads` wrote."""
    return load_file(os.path.join(checkpoint, HEADS_FILE))


def whole_state(heads: nn.Module) -> dict[str, torch.Tensor]:
    """Returns weights that FSDP2 has sharded, whole and in host memory; the first process's only. All must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(heads, options=options)
    return state


def load_whole_state(heads: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Loads what `whole_state` returned, of which each process takes its part. All must call it.

    Args:
        heads: The sharded heads, some or all of which may have no weights.
        state: What the first process's `whole_state` returned. Those of the others are not read: a checkpoint that
            each node has saved for itself holds the heads on the first node only.
    """
    if not heads.state_dict():  # torch takes an empty state for a lost one
        return
    of_first: dict[str, Any] = dict(state) if torch.distributed.get_rank() == 0 else {}
    set_model_state_dict(heads, of_first, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def fsdp_files(plugin: FullyShardedDataParallelPlugin) -> list[str]:
    """Names of the files in which accelerate's plugin saves model and optimizer, of each one by which it is known."""
    if plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
        return [f"{FSDP_MODEL_NAME}.bin", f"{OPTIMIZER_NAME}.bin"]
    return [f"{FSDP_MODEL_NAME}_0/.metadata", f"{OPTIMIZER_NAME}_0/.metadata"]


def fsdp_weights(plugin: FullyShardedDataParallelPlugin, checkpoint: str) -> set[str]:
    """Names of the weights that accelerate's plugin has saved of a model; the weights themselves are not read."""
    if plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
        return set(torch.load(Path(checkpoint) / f"{FSDP_MODEL_NAME}.bin", "cpu", weights_only=True, mmap=True))
    metadata = FileSystemReader(Path(checkpoint) / f"{FSDP_MODEL_NAME}_0").read_metadata()
    return {name.removeprefix("model.") for name in metadata.state_dict_metadata}


@contextlib.contextmanager
def complete_states(optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Gives, in this block, the parameters that have not been stepped yet the state that their first step begins with.

    torch loads the state of a sharded optimizer only if it has that of every trained parameter, and blocks that wait
    for the task's gradient have none at first.

    Args:
        optimizer: What is to be saved.

    Yields:
        How many trained parameters still have none, since it is not known what the optimizer begins with.
    """
    stepped = [state for state in optimizer.state.values() if state]
    waiting = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    waiting = [parameter for parameter in waiting if not optimizer.state.get(parameter)] if stepped else []
    if type(optimizer) not in _STARTS_AT_ZERO:
        yield len(waiting)
        return
    for parameter in waiting:
        optimizer.state[parameter] = {
            name: torch.zeros_like(parameter, dtype=value.dtype) if value.dim() > 0 else torch.zeros_like(value)
            for name, value in stepped[0].items()
        }
    try:
        yield 0
    finally:
        for parameter in waiting:
            del optimizer.state[parameter]


class StagedCheckpoint:
    """A checkpoint that is written under another name and renamed when it is complete.

    A kill at any moment leaves the previous checkpoint the last one.

    Attributes:
        folder: Where it is written.
        final: Its name when it is complete.

    Args:
        run_dir: The run's folder.
        step: The optimizer step.
        accelerator: The processes that write it.
    """

    def __init__(self, run_dir: str, step: int, accelerator: Accelerator) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self.folder = Path(run_dir) / STAGING_FOLDER / name
        self.final = Path(run_dir) / name
        self._accelerator = accelerator

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Makes room for what all processes write in this block, and gives it its name afterwards."""
        if self._accelerator.is_local_main_process:
            shutil.rmtree(self.folder.parent, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        yield
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_local_main_process:
            publish_folder(self.folder, self.final)
        self._accelerator.wait_for_everyone()
