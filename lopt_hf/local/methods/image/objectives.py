"""What early blocks of an image classifier learn from: the classes.

Shapes: B batch, T tokens, D hidden channels (of a convolutional network feature maps), L classes.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lopt_hf.local.objectives import LocalBatch

__all__ = ["AuxiliaryObjective", "ClassifierObjective", "FrozenTailObjective"]


def _cross_entropy(logits_BL: torch.Tensor, batch: LocalBatch) -> torch.Tensor:
    return F.cross_entropy(logits_BL.float(), batch.inputs["labels"].to(logits_BL.device))


class ClassifierObjective:
    """Cross-entropy of the classes, through a classifier that each block has of its own: plain local learning.

    The method makes the classifiers, since a block's shape says which.
    """

    def __call__(
        self, head: nn.Module, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: LocalBatch
    ) -> torch.Tensor:
        return _cross_entropy(head(output_BTD), batch)


class FrozenTailObjective:
    """Cross-entropy of the classes, through a frozen copy of the model's own norm and classifier.

    Args:
        tail: The copy.
    """

    def __init__(self, tail: nn.Module) -> None:
        self.tail = tail.requires_grad_(False)

    def __call__(
        self, head: nn.Module, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: LocalBatch
    ) -> torch.Tensor:
        return _cross_entropy(self.tail(output_BTD), batch)


class AuxiliaryObjective:
    """Cross-entropy of the classes behind MLAAN's auxiliary, and on the block's own output.

    Args:
        tail: A frozen classifier of both; default: those of the auxiliary, one for each.
    """

    def __init__(self, tail: nn.Module | None = None) -> None:
        self.tail = tail

    def __call__(
        self, head: Any, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: LocalBatch
    ) -> torch.Tensor:
        own = head.independent if output_BTD is input_BTD else head.readout
        return _cross_entropy((own if self.tail is None else self.tail)(output_BTD), batch)
