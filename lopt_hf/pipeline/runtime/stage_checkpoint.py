"""What one stage contributes to a checkpoint, and how it goes on from one."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.trainer import SCALER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lopt_hf.common.upstream.trainers import SCHEDULER_NAME, TRAINER_STATE_NAME
from lopt_hf.local.heads import HEADS_NAME
from lopt_hf.pipeline.runtime.checkpoint import (
    INCOMPLETE,
    WEIGHTS_FILE,
    Manifest,
    load_weights,
    publish_when_complete,
    save_weights,
)
from lopt_hf.pipeline.runtime.logs import is_of_own_block
from lopt_hf.pipeline.runtime.optimizer_state import (
    SETTINGS_FILE,
    TENSORS_FILE,
    load_optimizer_state,
    save_optimizer_state,
)
from lopt_hf.trainers.checkpoint import HEADS_FILE, check_files
from lopt_hf.trainers.resume_state import STATE_FILE, ResumeState

__all__ = [
    "check_parts",
    "load_in_flight",
    "load_replica_state",
    "load_stage_optimizer",
    "load_stage_weights",
    "replica_folder",
    "save_process",
]

# What a run reads of a stage's folder
_FILES = (WEIGHTS_FILE, TENSORS_FILE, SETTINGS_FILE, SCHEDULER_NAME, TRAINER_STATE_NAME, HEADS_FILE, STATE_FILE)
IN_FLIGHT = "in-flight"  # a checkpoint's folder of what the gradients that are on their way need


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
    folder = replica_folder(staged / trainer.plan.name, trainer.world.replica)
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


def replica_folder(stage_folder: Path, replica: int) -> Path:
    """Returns the folder of what a replica alone has of a stage; the first one's is the stage's.

    Args:
        stage_folder: The folder of the stage.
        replica: The replica.
    """
    return stage_folder.with_name(f"{stage_folder.name}-replica-{replica}") if replica else stage_folder


def check_parts(trainer: Any, manifest: Manifest) -> None:
    """Checks, before anything of it is loaded, that a checkpoint's files are there, whole, and of the run's model.

    Args:
        trainer: The stage's trainer, which reads of each stage what is its own.
        manifest: The checkpoint.

    Raises:
        ValueError: If one is missing or damaged, or has a weight of another shape.
    """
    shapes = {name: tensor.shape for name, tensor in _state_to_save(trainer).items()}
    for folder in manifest.stage_folders:
        check_files(str(folder), _FILES, shapes)
        check_files(str(replica_folder(folder, trainer.world.replica)), [STATE_FILE], {})


def load_replica_state(trainer: Any, stage_folder: Path, metrics: Mapping[str, list[float]]) -> ResumeState:
    """Reads what a process had counted: tokens, the loss since the last log.

    Args:
        trainer: The stage's trainer.
        stage_folder: The folder of the stage that it goes on from.
        metrics: The metrics since the last log, from `load_stage_weights`.
    """
    state: ResumeState = trainer.check_checkpoint(str(replica_folder(stage_folder, trainer.world.replica)))
    return replace(state, metrics_since_log=metrics)


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
    check_files(str(manifest.folder), [f"{path.parent.name}/{path.name}"], {})
    trainer.delayed.load_state(torch.load(path, map_location="cpu", weights_only=True))


def _save_stage(trainer: Any, folder: Path, final: Path) -> None:
    """Writes a stage's part of a checkpoint, by names that do not depend on how blocks are spread."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
    folder.mkdir(parents=True)
    trainer.store_flos()
    save_weights({n: t.detach() for n, t in _state_to_save(trainer).items()}, folder)
    save_optimizer_state(trainer.optimizer, _stepped_parameters(trainer), folder)
    torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
    trainer._save_rng_state(str(folder))
    _save_gradient_scaler(trainer, folder)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states: Any = trainer.state.stateful_callbacks
            states[type(callback).__name__] = callback.state()
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    trainer._save_local_state(folder, final)
    if isinstance(trainer.model, PeftModel):
        trainer.model.peft_config[trainer.model.active_adapter].save_pretrained(str(folder))


def _save_gradient_scaler(trainer: Any, folder: Path) -> None:
    """Writes the scale of fp16's gradients, which the parent loads; replicas average theirs, so it is one."""
    scaler = trainer.accelerator.scaler
    if scaler is not None:
        torch.save(scaler.state_dict(), folder / SCALER_NAME)


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
        path = replica_folder(folder, trainer.world.replica) / STATE_FILE
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
