"""The base class of mixins that stand before a trainer in the list of base classes."""

from typing import TYPE_CHECKING

__all__ = ["TrainerBase"]

if TYPE_CHECKING:  # a type checker is told that such a mixin is a trainer
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object
