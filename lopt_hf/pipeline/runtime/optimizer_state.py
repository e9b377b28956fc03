"""An optimizer's state in a checkpoint, by parameters' names: read again however these are spread over stages."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

__all__ = [
    "SETTINGS_FILE",
    "TENSORS_FILE",
    "OptimizerStateCheck",
    "check_optimizer_state",
    "load_optimizer_state",
    "save_optimizer_state",
]

TENSORS_FILE = "optimizer.safetensors"
SETTINGS_FILE = "optimizer.json"
SEPARATOR = "|"  # between a parameter's name and the name of its state; no parameter's name has one


class OptimizerStateCheck(TrainerCallback):
    """Stops a run at its first step, which makes the optimizer's state, if no checkpoint could hold that."""

    def __init__(self) -> None:
        self._is_done = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if not self._is_done and any(optimizer.state.values()):  # a stage may wait for its first gradient
            check_optimizer_state(optimizer)
            self._is_done = True


def check_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Checks that an optimizer's state can be written.

    Args:
        optimizer: The optimizer, which has stepped.

    Raises:
        ValueError: If it has other values than tensors and what JSON can hold, such as torchao's quantised tensors,
            which are of a class of their own.
    """
    kept = [values for values in optimizer.state.values() if isinstance(values, Mapping)]
    plain = [{key: value for key, value in values.items() if type(value) is not torch.Tensor} for values in kept]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    for values in (*plain, *settings):
        for key, value in values.items():
            try:
                json.dumps(value)
            except TypeError as error:
                optim = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has it
                raise ValueError(
                    f"optim={type(optim).__name__} keeps {key!r} of type {type(value).__name__}, which a "
                    "pipeline's checkpoint cannot hold; choose another optim, or set save_strategy to 'no'."
                ) from error


def save_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Writes state and settings of each parameter that the optimizer steps.

    Args:
        optimizer: Any optimizer whose state is tensors and plain numbers (`check_optimizer_state`).
        parameters: Its parameters by names that do not depend on how they are spread.
        folder: Where the two files go.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    check_optimizer_state(optimizer)
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    plain: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            settings[name] = {key: value for key, value in group.items() if key != "params"}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensor = value.contiguous()
                    if tensor.untyped_storage().data_ptr() in storages:  # bitsandbytes' parameters share their tables
                        tensor = tensor.clone()
                    storages.add(tensor.untyped_storage().data_ptr())
                    tensors[f"{name}{SEPARATOR}{key}"] = tensor
                else:
                    plain.setdefault(name, {})[key] = value
    save_file(tensors, folder / TENSORS_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps({"settings": settings, "state": plain}), encoding="utf-8")


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], folders: Iterable[Path]
) -> None:
    """Restores what `save_optimizer_state` wrote, from whichever folders hold the parameters.

    Args:
        optimizer: A new optimizer over the same parameters.
        parameters: Its parameters by the names used for saving.
        folders: Where to look.

    Raises:
        ValueError: If a parameter is in none of the folders.
    """
    settings: dict[str, dict[str, Any]] = {}
    state: dict[str, dict[str, Any]] = {}
    for folder in folders:
        content = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        settings.update(content["settings"])
        state.update(content["state"])
        with safe_open(folder / TENSORS_FILE, framework="pt") as file:
            for key in file.keys():
                name, _, entry = key.rpartition(SEPARATOR)
                if name in parameters:
                    state.setdefault(name, {})[entry] = file.get_tensor(key)
    names = {id(parameter): name for name, parameter in parameters.items()}
    owned = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    order = [name for group in owned for name in group]
    missing = [name for name in order if name not in settings]
    if missing:
        raise ValueError(f"The checkpoint has no optimizer state of {missing[0]!r}; it is from another run.")
    positions = {name: position for position, name in enumerate(order)}
    # A group without parameters (one for biases, of an adapter that has none) has kept its settings.
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    groups = [
        {**(settings[group[0]] if group else own), "params": [positions[name] for name in group]}
        for group, own in zip(owned, kept, strict=True)
    ]
    packed = {positions[name]: values for name, values in state.items() if name in positions}
    optimizer.load_state_dict({"state": packed, "param_groups": groups})
