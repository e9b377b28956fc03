"""Callbacks that log through the trainer they were added to."""

import weakref
from collections.abc import Iterable
from typing import Any

from transformers import Trainer, TrainerCallback

__all__ = ["TrainerBound", "bind_callbacks"]


class TrainerBound(TrainerCallback):
    """A callback that knows its trainer, which transformers does not tell it.

    LoPT's trainers bind such callbacks when they are added; for any other trainer pass it to `bind`, or to the
    callback's `trainer` argument.
    """

    _trainer: "weakref.ref[Trainer] | None" = None

    def bind(self, trainer: Trainer) -> None:
        """Tells the callback its trainer; only weakly held, since the trainer holds the callback."""
        self._trainer = weakref.ref(trainer)

    @property
    def trainer(self) -> Trainer:
        """The trainer.

        Raises:
            ValueError: If the callback is not bound.
        """
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} has no trainer to log through; pass `{name}(..., trainer=trainer)`. With LoPT's trainers "
                "`trainer.add_callback` is enough."
            )
        return trainer


def bind_callbacks(callbacks: Iterable[Any], trainer: Trainer) -> None:
    """Binds those of the callbacks that want to know their trainer."""
    for callback in callbacks:
        if isinstance(callback, TrainerBound):
            callback.bind(trainer)
