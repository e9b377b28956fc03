"""Checkpoints that are whole or absent, and that resume local learning exactly."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lopt_hf.common.upstream.trainers import TRAINER_STATE_NAME

__all__ = ["CheckpointMixin", "read_local_state"]

# The mixins stand before a trainer in the list of base classes; a type checker is told that they are one.
if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object

HEADS_FILE = "local_heads.safetensors"
STATE_FILE = "local_learning.json"
STAGING_FOLDER = "incomplete-checkpoint"  # `get_last_checkpoint` does not match it


def read_local_state(checkpoint: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what `CheckpointMixin` saved beside a checkpoint.

    Args:
        checkpoint: The checkpoint's folder.
        settings: The block settings of the run that wants to resume.

    Raises:
        ValueError: If the checkpoint is not one of local learning, or was trained with other block settings or
            through another readout.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} has no {STATE_FILE}: it is not a checkpoint of this trainer. "
            "To start from its weights, pass the folder as `model`."
        )
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if state["settings"].get(name) != value and name == "readout":
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} learned through a final norm and LM head that are not those "
                "of this run's model; pass the model that the run started from, not one that was trained since."
            )
        if state["settings"].get(name) != value:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} was trained with {name}={state['settings'].get(name)}, but "
                f"this run has {name}={value}; resume with the same settings, or start anew in another output_dir."
            )
    return state


class CheckpointMixin(TrainerBase):
    """Writes checkpoints under another name and renames them when they are complete.

    A kill at any moment leaves the previous checkpoint the last one. Beside the parent's files a checkpoint holds the
    local heads and what the parent forgets: token count, and losses and metrics since the last log.
    """

    args: Any
    model: Any
    local_heads: nn.ModuleDict
    _metrics: dict[str, Any]  # TRL's
    _total_train_tokens: int  # TRL's
    _name: str  # TRL's, of the method
    _block_settings: Callable[[], dict[str, Any]]  # what a checkpoint must share with the run that resumes it

    _staging: Path | None = None  # while a checkpoint is being written
    _resumed: dict[str, Any] | None = None  # from `train(resume_from_checkpoint=...)` to the first epoch
    _heads_in_model = False

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / STAGING_FOLDER / name, run_dir / name
        if self.accelerator.is_local_main_process:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self._save_local_state(staged, final)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            _publish(staged, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The parent pushes in the background while it saves: wait until the folder has its final name.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_local_state(self, staged: Path, final: Path) -> None:
        loss_since_log = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)  # on every rank: each loads the best model at the end
        if not self.args.should_save:
            return
        if not self._heads_in_model:
            save_file({k: v.contiguous() for k, v in self._heads_state().items()}, staged / HEADS_FILE)
        state = {
            "trainer": self._name,
            "settings": self._block_settings(),
            "total_train_tokens": self._total_train_tokens,
            "metrics_since_log": self._metrics["train"],
            "loss_since_log": loss_since_log,
            "last_logged_step": self._globalstep_last_logged,
        }
        (staged / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        if self.state.best_global_step == self.state.global_step:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def check_checkpoint(self, checkpoint: str) -> None:
        """Raises if this trainer cannot go on from a checkpoint.

        Raises:
            ValueError: If another kind of trainer wrote it, or one with other block settings.
        """
        trainer = read_local_state(checkpoint, self._block_settings()).get("trainer", self._name)
        if trainer != self._name:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is a checkpoint of {trainer}, but this run is {self._name}; "
                "to start from its weights, pass the folder as `model`."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.check_checkpoint(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self._heads_in_model:
            self._load_heads_state(load_file(os.path.join(resume_from_checkpoint, HEADS_FILE)))

    def _heads_state(self) -> dict[str, torch.Tensor]:
        """The heads' own weights: those that a resumed run cannot find in its model."""
        return self.local_heads.state_dict()

    def _load_heads_state(self, state: dict[str, torch.Tensor]) -> None:
        self.local_heads.load_state_dict(state)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The parent starts these at zero when it resumes between two logs.
        if self._resumed is not None:
            state, self._resumed = self._resumed, None
            self._total_train_tokens = state["total_train_tokens"]
            self._metrics["train"].update(state["metrics_since_log"])
            self._globalstep_last_logged = state["last_logged_step"]
            if len(state["loss_since_log"]) == self.args.world_size:
                self._tr_loss += state["loss_since_log"][self.args.process_index]
        if self.state.global_step >= self.state.max_steps:  # the parent would train a step before it looks
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def _publish(staged: Path, final: Path) -> None:
    """Renames a finished checkpoint, in place of one of the same step that an earlier run left."""
    if not staged.is_dir():  # another node has renamed it on the shared file system
        return
    replaced = staged.parent / f"{final.name}-replaced"
    if final.exists():
        os.replace(final, replaced)
    with contextlib.suppress(FileNotFoundError):
        os.replace(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)
