"""Checkpoints that a run goes on from."""

import os

from transformers.trainer_utils import get_last_checkpoint

__all__ = ["find_checkpoint"]


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """Finds the folder that `resume_from_checkpoint` means.

    Args:
        output_dir: The run's folder.
        resume_from_checkpoint: A checkpoint's folder; `true` for the last one in `output_dir`; `auto` likewise, but
            without one the run starts anew.

    Returns:
        `None` for a run that starts anew.

    Raises:
        ValueError: If there is no such checkpoint.
    """
    value = str(resume_from_checkpoint or "false")
    if value.lower() == "false":
        return None
    wants_last = value.lower() in ("true", "auto")
    folder = output_dir if wants_last else value
    checkpoint = folder if os.path.isdir(folder) else None
    if checkpoint is not None and wants_last:
        checkpoint = get_last_checkpoint(folder)
    if checkpoint is None and value.lower() != "auto":
        raise ValueError(
            f"resume_from_checkpoint={value}: there is no checkpoint at {folder!r}; name a checkpoint's folder, or "
            "leave it out to start anew ('auto' goes on from the last checkpoint if there is one)."
        )
    return checkpoint
