"""A training run that kills its own process in the middle of a step; started by `test_resume.py`."""

import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import tests.conftest  # noqa: F401  (offline, one thread)
from tests.trainers.helpers import make_trainer


class KillAt(TrainerCallback):
    """SIGKILL when the gradients of a step are there and the weights are not yet changed."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


# Each batch of completions is trained on at three steps, so that some wait in the checkpoint at step 4.
REUSE = {"num_iterations": 3}


def make_resumable_trainer(output_dir: Path, kind: str, num_blocks: int, accumulation: int) -> Any:
    """A run of 8 steps with a checkpoint at 4, between two logs."""
    return make_trainer(
        output_dir,
        kind=kind,
        **(REUSE if kind == "grpo" else {}),
        num_blocks=num_blocks,
        gradient_accumulation_steps=accumulation,
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
        logging_steps=3,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=2,
    )


def run_until_killed(output_dir: Path, kind: str, num_blocks: int, accumulation: int, step: int) -> None:
    trainer = make_resumable_trainer(output_dir, kind, num_blocks, accumulation)
    trainer.add_callback(KillAt(step))
    trainer.train()
