"""What one stage contributes to a checkpoint and to the saved model, and how it goes on from a checkpoint."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import upload_folder
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lopt_hf.common.upstream.trainers import SCHEDULER_NAME, TRAINER_STATE_NAME
from lopt_hf.local.heads import HEADS_NAME
from lopt_hf.pipeline.runtime.checkpoint import (
    INCOMPLETE,
    Manifest,
    load_weights,
    publish_when_complete,
    save_weights,
)
from lopt_hf.pipeline.runtime.export import assemble_model
from lopt_hf.pipeline.runtime.logs import is_of_own_block
from lopt_hf.trainers.checkpoint import HEADS_FILE
from lopt_hf.trainers.resume_state import STATE_FILE, ResumeState

__all__ = [
    "find_random_state",
    "load_in_flight",
    "load_optimizer_state",
    "load_replica_state",
    "load_stage_optimizer",
    "load_stage_weights",
    "push_model",
    "save_optimizer_state",
    "save_process",
    "save_stage_model",
]

IN_FLIGHT = "in-flight"  # a checkpoint's folder of what the gradients that are on their way need
OPTIMIZER_TENSORS_FILE = "optimizer.safetensors"
OPTIMIZER_SETTINGS_FILE = "optimizer.json"
SEPARATOR = "|"  # between a parameter's name and the name of its state; no parameter's name has one


def _state_to_save(trainer: Any) -> dict[str, torch.Tensor]:
    """What training changes: trainable weights and the buffers that a checkpoint holds."""
    state = trainer.model.state_dict(keep_vars=True)
    return {n: t for n, t in state.items() if not isinstance(t, nn.Parameter) or t.requires_grad}


def _stepped_parameters(trainer: Any) -> dict[str, torch.Tensor]:
    heads = {f"{HEADS_NAME}.{name}": parameter for name, parameter in trainer.local_heads.named_parameters()}
    return {**{n: p for n, p in trainer.model.named_parameters() if p.requires_grad}, **heads}


def save_process(trainer: Any) -> None:
    """Writes what a process contributes to a checkpoint.

    That is the stage, by its first replica; and of each replica the random state, what it has counted since the last
    log, and what is in flight.
    """
    name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    output_dir = Path(trainer.args.output_dir)
    staged, final = output_dir / f"{INCOMPLETE}{name}" / name, output_dir / name
    if trainer.delayed is not None:
        path = _in_flight(staged, trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(trainer.delayed.state(), path)
    folder = _of_replica(staged / trainer.plan.name, trainer.world.replica)
    if trainer.world.replica == 0:
        _save_stage(trainer, folder, final)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        trainer._save_rng_state(str(folder))
        ResumeState.of(trainer, [trainer._tr_loss.item()]).write(folder)
    base_model = trainer.learner.base_model
    details = {
        "step": trainer.state.global_step,
        "model": base_model.config.name_or_path,
        "model_revision": trainer.model_revision,
        "dtype": str(base_model.dtype).removeprefix("torch."),
        "data_parallel": trainer.world.num_replicas,
        **trainer.gradient_settings,
        **trainer.learner.fingerprint(),
    }
    if publish_when_complete(trainer.store, staged, final, trainer.plans, details, trainer.world.mesh.size()):
        rotate_checkpoints(str(output_dir), save_total_limit=trainer.args.save_total_limit, use_mtime=True)


def _of_replica(stage_folder: Path, replica: int) -> Path:
    """The folder of what a replica alone has of a stage; the first one's is the stage's."""
    return stage_folder.with_name(f"{stage_folder.name}-replica-{replica}") if replica else stage_folder


def _state_of_replica(stage_folder: Path, replica: int) -> Path:
    """The folder of a replica's counts; the stage's where a checkpoint is from before each had its own."""
    own = _of_replica(stage_folder, replica)
    return own if (own / STATE_FILE).is_file() else stage_folder


def load_replica_state(trainer: Any, stage_folder: Path, metrics: Mapping[str, list[float]]) -> ResumeState:
    """Reads what a process had counted: tokens, the loss since the last log.

    Args:
        trainer: The stage's trainer.
        stage_folder: The folder of the stage that it goes on from.
        metrics: The metrics since the last log, from `load_stage_weights`.
    """
    folder = _state_of_replica(stage_folder, trainer.world.replica)
    state: ResumeState = trainer.check_checkpoint(str(folder))
    return replace(state, metrics_since_log=metrics)


def find_random_state(trainer: Any, stage_folder: Path) -> Path:
    """Finds the folder of a process's random state in a checkpoint.

    Args:
        trainer: The stage's trainer.
        stage_folder: The folder of the stage that it goes on from.
    """
    world = trainer.world
    if world.num_replicas > 1 and not _of_replica(stage_folder, 1).is_dir():
        if world.reports:
            trainer._say(
                f"{stage_folder} is from before replicas had random states of their own: all go on with the first "
                "one's, and dropout is not that of a run that was never stopped."
            )
        return stage_folder
    return _of_replica(stage_folder, world.replica)


def _in_flight(checkpoint: Path, trainer: Any) -> Path:
    """The file of what a process has kept for the gradients that are on their way."""
    return checkpoint / IN_FLIGHT / f"{trainer.plan.name}-{trainer.world.replica}.pt"


def load_in_flight(trainer: Any, manifest: Manifest) -> None:
    """Goes on with the gradients that were on their way when a checkpoint was written."""
    path = _in_flight(manifest.folder, trainer)
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint={str(manifest.folder)!r} has no {path.parent.name}/{path.name}, which the task's "
            "gradients that were on their way need; go on from a whole checkpoint."
        )
    trainer.delayed.load_state(torch.load(path, map_location=trainer.args.device, weights_only=True))


def _save_stage(trainer: Any, folder: Path, final: Path) -> None:
    """Writes a stage's part of a checkpoint, by names that do not depend on how blocks are spread."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
    folder.mkdir(parents=True)
    trainer.store_flos()
    save_weights({n: t.detach() for n, t in _state_to_save(trainer).items()}, folder)
    save_optimizer_state(trainer.optimizer, _stepped_parameters(trainer), folder)
    torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
    trainer._save_rng_state(str(folder))
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states: Any = trainer.state.stateful_callbacks
            states[type(callback).__name__] = callback.state()
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    trainer._save_local_state(folder, final)
    if isinstance(trainer.model, PeftModel):
        trainer.model.peft_config[trainer.model.active_adapter].save_pretrained(str(folder))


def load_stage_weights(trainer: Any, manifest: Manifest) -> dict[str, list[float]]:
    """Reads a stage's weights and heads from a checkpoint, whichever stages it is of.

    Returns:
        The metrics since the last log that are this stage's, as this replica has them.
    """
    folders = manifest.stage_folders
    load_weights(_state_to_save(trainer), folders)
    load_weights(trainer.learner.state(), folders, HEADS_FILE)
    metrics: dict[str, list[float]] = {}
    for folder in folders:
        path = _state_of_replica(folder, trainer.world.replica) / STATE_FILE
        saved = json.loads(path.read_text(encoding="utf-8"))["metrics_since_log"]
        is_task = trainer.plan.is_last and folder == folders[-1]
        metrics |= {
            name: values
            for name, values in saved.items()
            if is_of_own_block(trainer.plan, name) or (is_task and not name.startswith("local_loss/"))
        }
    return metrics


def load_stage_optimizer(trainer: Any, manifest: Manifest, checkpoint: str) -> None:
    """Reads the state of a stage's optimizer and scheduler.

    Args:
        trainer: The stage's trainer.
        manifest: The checkpoint.
        checkpoint: The folder of the stage that this one goes on from.
    """
    load_optimizer_state(trainer.optimizer, _stepped_parameters(trainer), manifest.stage_folders)
    state = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
    groups = trainer.optimizer.param_groups
    if len(state.get("base_lrs", groups)) != len(groups):  # other stages, other parameter groups
        state |= {"base_lrs": trainer.lr_scheduler.base_lrs, "_last_lr": [group["lr"] for group in groups]}
        state["lr_lambdas"] = [None] * len(groups)
    trainer.lr_scheduler.load_state_dict(state)


def save_stage_model(trainer: Any, target: Path) -> None:
    """Makes one stock checkpoint of all stages; every process must call it, and waits until it is complete."""
    staged = target / f"{INCOMPLETE}model"
    store = trainer.world.new_run_store()
    if trainer.world.replica == 0:
        folder = staged / trainer.plan.name
        shutil.rmtree(folder, ignore_errors=True)
        trainer._save(str(folder), _exported_state(trainer))
        if store.add("written", 1) == len(trainer.plans):
            assemble_model([staged / plan.name for plan in trainer.plans], target)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(target)
            shutil.rmtree(staged)
            store.set("complete", "")
    trainer.world.monitor.wait_for(store, "complete")


def _exported_state(trainer: Any) -> dict[str, torch.Tensor] | None:
    """What goes into the model: a head that is tied to the embeddings is saved with them, on another stage."""
    if isinstance(trainer.model, PeftModel):
        return None
    others = {} if trainer.plan.is_last else trainer.learner.owned()[-1]  # the frozen readout
    state = {name: tensor for name, tensor in trainer.model.state_dict().items() if name not in others}
    base_model = trainer.learner.base_model
    head = base_model.get_output_embeddings() if trainer.plan.is_last else None  # of images there is none
    if head is not None and base_model.config.get_text_config(decoder=True).tie_word_embeddings:
        own = {id(parameter) for parameter in head.parameters()}
        state = {n: t for n, t in trainer.model.state_dict(keep_vars=True).items() if id(t) not in own}
    return state


def push_model(trainer: Any) -> None:
    """Uploads the saved model to the hub, without the checkpoints."""
    upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=str(trainer.args.output_dir),
        token=trainer.args.hub_token,
        commit_message="End of training",
        ignore_patterns=[f"{PREFIX_CHECKPOINT_DIR}-*", f"{INCOMPLETE}*"],
    )


def save_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Writes state and settings of each parameter that the optimizer steps.

    Args:
        optimizer: Any optimizer whose state is tensors and plain numbers.
        parameters: Its parameters by names that do not depend on how they are spread.
        folder: Where the two files go.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            settings[name] = {key: value for key, value in group.items() if key != "params"}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}{SEPARATOR}{key}"] = value.contiguous()
                else:
                    plain.setdefault(name, {})[key] = value
    save_file(tensors, folder / OPTIMIZER_TENSORS_FILE)
    (folder / OPTIMIZER_SETTINGS_FILE).write_text(json.dumps({"settings": settings, "state": plain}), encoding="utf-8")


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
        content = json.loads((folder / OPTIMIZER_SETTINGS_FILE).read_text(encoding="utf-8"))
        settings.update(content["settings"])
        state.update(content["state"])
        with safe_open(folder / OPTIMIZER_TENSORS_FILE, framework="pt") as file:
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
