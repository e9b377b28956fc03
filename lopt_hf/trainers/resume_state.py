"""What a checkpoint of local learning holds of its trainer, beside the parent's files and the heads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_hf.trainers.checkpoint import read_json

__all__ = ["STATE_FILE", "ResumeState"]

STATE_FILE = "local_learning.json"


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

    @classmethod
    def of(cls, trainer: Any, loss_since_log: list[float]) -> "ResumeState":
        """Reads the state of a trainer, but for the loss, which takes all processes to tell."""
        return cls(
            trainer=trainer._name,
            settings=trainer.learner.fingerprint(),
            total_train_tokens=trainer._total_train_tokens,
            metrics_since_log=trainer._metrics["train"],
            loss_since_log=loss_since_log,
            last_logged_step=trainer._globalstep_last_logged,
        )

    def restore(self, trainer: Any) -> None:
        """Gives a trainer what the parent starts at zero when it resumes between two logs."""
        trainer._total_train_tokens = self.total_train_tokens
        trainer._metrics["train"].update(self.metrics_since_log)
        trainer._globalstep_last_logged = self.last_logged_step
        if len(self.loss_since_log) == trainer.args.world_size:
            trainer._tr_loss += self.loss_since_log[trainer.args.process_index]
            # `train_loss` is the mean of the steps of this call, which these are not.
            trainer._total_loss_scalar -= sum(self.loss_since_log) / trainer.args.world_size

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
        content: dict[str, Any] = read_json(path, checkpoint)
        try:
            state = cls(**{"trainer": trainer, **content})
        except TypeError as error:
            raise ValueError(f"resume_from_checkpoint={checkpoint!r}: {STATE_FILE} is damaged ({error}).") from error
        for name in (*settings, *(name for name in state.settings if name not in settings)):
            saved, value = state.settings.get(name), settings.get(name)
            if name == "frozen_readout" and saved is None:  # MLAAN's, of a checkpoint from before it was noted
                continue
            is_readout = name == "frozen_readout" or (name == "readout" and settings.get("method") != "MLAAN")
            if saved != value and is_readout:
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
