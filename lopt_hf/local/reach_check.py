"""A look at the autograd graph: whether a block's loss reaches parameters of other blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from lopt_hf.local.blocks import Block
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.ownership import leaves_behind, parameters_by_block
from lopt_hf.local.stacks import DecoderStack

__all__ = ["ReachCheck"]


class ReachCheck:
    """Checks once for each block that its loss stays where it belongs, and again for inputs of a new kind.

    Args:
        model: A `transformers` causal language model (of a `PeftModel`, its base model).
        stack: Its decoder.
        blocks: The cut of its decoder layers.
    """

    def __init__(self, model: PreTrainedModel, stack: DecoderStack, blocks: Sequence[Block]) -> None:
        self.model = model
        self.stack = stack
        self.blocks = blocks
        self._unchecked: set[int] = set()
        self._kinds: set[tuple[frozenset[str], int]] = set()

    def look_again(self, inputs: Mapping[str, Any]) -> None:
        """Prepares to look at every block again where parameters may get their first gradient from these inputs.

        Those of a vision tower have none before the first batch with an image, nor what was frozen before it is not.
        """
        given = frozenset(name for name, value in inputs.items() if value is not None)
        kind = given, sum(parameter.requires_grad for parameter in self.model.parameters())
        if kind not in self._kinds:
            self._kinds.add(kind)
            self._unchecked = set(range(len(self.blocks)))

    def __call__(self, index: int, loss: torch.Tensor, first: int | None = None) -> None:
        """Raises if a block's first loss, or first with inputs of a new kind, reaches a parameter of another block.

        Args:
            index: The block's index.
            loss: Its loss, or the output of which its loss is made.
            first: The first of the blocks before it that the loss is to reach, too.

        Raises:
            RuntimeError: If it does; the message names the parameter.
        """
        if index not in self._unchecked or not loss.requires_grad:
            return
        self._unchecked.discard(index)
        owned = parameters_by_block(self.model, self.stack, self.blocks)
        foreign = {
            name: parameter
            for other, parameters in enumerate(owned)
            for name, parameter in parameters.items()
            if not (index if first is None else first) <= other <= index
            and parameter.requires_grad
            and not LocalHeads.is_name_of_head(name)
        }
        if not foreign:
            return
        # Not by a backward: where two blocks share a part of the graph, the first one's has freed it.
        leaves = leaves_behind([loss])
        reached = [name for name, parameter in foreign.items() if parameter in leaves]
        if reached:
            raise RuntimeError(
                f"The loss of block {index} reaches {reached[0]!r}, which belongs to another block. The blocks of "
                f"{type(self.model).__name__} share weights or inputs (for every layer, as in Gemma 3n, or image "
                "features that later layers are given too), and local learning cannot separate them; freeze that "
                "parameter, or please report the architecture."
            )
