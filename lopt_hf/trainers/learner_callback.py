"""What the training loop does for the model, done for the learner."""

import weakref
from typing import Any

from transformers import TrainerCallback

__all__ = ["LearnerCallback"]


class LearnerCallback(TrainerCallback):
    """Begins and ends the learner's steps, and logs the losses at the start.

    Args:
        trainer: The trainer, whose learner it is.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.proxy(trainer)  # the trainer holds the callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = self._trainer.start_losses
        if losses and state.global_step == 0:
            self._trainer.log({f"local_loss/{name}/start": loss for name, loss in losses.items()})

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.learner.begin_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.learner.after_step()
        self._trainer.learner.heads.zero_grad()  # as the loop's `model.zero_grad()`, which comes next
