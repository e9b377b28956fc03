"""Checkpoints that are whole or absent, and that resume local learning exactly."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

__all__ = ["HEADS_FILE", "STATE_FILE", "ResumeState", "StagedCheckpoint", "load_heads", "save_heads"]

HEADS_FILE = "local_heads.safetensors"
STATE_FILE = "local_learning.json"
STAGING_FOLDER = "incomplete-checkpoint"  # `get_last_checkpoint` does not match it


@dataclass(frozen=True)
class ResumeState:
    """What a checkpoint holds beside the parent's files and the heads: what the parent forgets.

    Attributes:
        trainer: Name of the trainer that wrote it.
        settings: The learner's fingerprint.
        total_train_tokens: Tokens trained on so far.
        metrics_since_log: Metrics since the last log, by name.
        loss_since_log: Loss since the last log, of each process.
        last_logged_step: Step of the last log.
    """

    trainer: str
    settings: Mapping[str, Any]
    total_train_tokens: int
    metrics_since_log: Mapping[str, list[float]]
    loss_since_log: list[float]
    last_logged_step: int

    def write(self, folder: Path) -> None:
        """Writes the state into a checkpoint's folder."""
        (folder / STATE_FILE).write_text(json.dumps(vars(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: str, trainer: str, settings: Mapping[str, Any]) -> "ResumeState":
        """Reads the state of a checkpoint that a run wants to go on from.

        Args:
            checkpoint: The checkpoint's folder.
            trainer: Name of the run's trainer.
            settings: The fingerprint of the run's learner.

        Raises:
            ValueError: If the checkpoint is not one of local learning, was written by another kind of trainer, or was
                trained with other block settings or through another readout.
        """
        path = Path(checkpoint) / STATE_FILE
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} has no {STATE_FILE}: it is not a checkpoint of this trainer. "
                "To start from its weights, pass the folder as `model`."
            )
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        state = cls(**{"trainer": trainer, **content})
        for name in (*settings, *(name for name in state.settings if name not in settings)):
            saved, value = state.settings.get(name), settings.get(name)
            if saved != value and name == "readout":
                raise ValueError(
                    f"resume_from_checkpoint={checkpoint!r} learned through a final norm and LM head that are not "
                    "those of this run's model; pass the model that the run started from, not one that was trained "
                    "since."
                )
            if saved != value:
                raise ValueError(
                    f"resume_from_checkpoint={checkpoint!r} was trained with {name}={saved}, but this run has "
                    f"{name}={value}; resume with the same settings, or start anew in another output_dir."
                )
        if state.trainer != trainer:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is a checkpoint of {state.trainer}, but this run is "
                f"{trainer}; to start from its weights, pass the folder as `model`."
            )
        return state


def save_heads(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a learner's state into a checkpoint's folder."""
    save_file({name: value.contiguous() for name, value in state.items()}, folder / HEADS_FILE)


def load_heads(checkpoint: str) -> dict[str, torch.Tensor]:
    """Reads what `save_heads` wrote."""
    return load_file(os.path.join(checkpoint, HEADS_FILE))


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
            self._publish()
        self._accelerator.wait_for_everyone()

    def _publish(self) -> None:
        """Renames a finished checkpoint, in place of one of the same step that an earlier run left."""
        if not self.folder.is_dir():  # another node has renamed it on the shared file system
            return
        replaced = self.folder.parent / f"{self.final.name}-replaced"
        if self.final.exists():
            os.replace(self.final, replaced)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.folder, self.final)
        shutil.rmtree(self.folder.parent, ignore_errors=True)
