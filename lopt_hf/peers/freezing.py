"""Training the first blocks only: the reverse of freezing them, which is LoPT's control."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from lopt_hf.local.blocks import split_layers
from lopt_hf.local.embeddings import untie_output_embeddings
from lopt_hf.local.ownership import parameters_by_block
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.peers.base import Peer

__all__ = ["FreezeLast"]


class FreezeLast(Peer):
    """Trains the first block, embeddings included, and leaves all that follows it as it is.

    An LM head that shares the embeddings' weight gets a copy, which stays as it is too.

    Args:
        num_blocks: Blocks that the decoder layers are cut into.
        split_at: First layer of every block but the first, instead of an even split.
    """

    name = "freeze_last"
    takes_processes = True

    def __init__(self, num_blocks: int = 2, split_at: Sequence[int] | None = None) -> None:
        self.num_blocks, self.split_at = num_blocks, split_at

    def settings(self) -> dict[str, Any]:
        return {"num_blocks": self.num_blocks, "split_at": None if self.split_at is None else list(self.split_at)}

    def prepare(self, model: PreTrainedModel) -> None:
        untie_output_embeddings(model)
        stack = find_decoder_stack(model)
        blocks = split_layers(len(stack.layers), self.num_blocks, self.split_at)
        for block in parameters_by_block(model, stack, blocks)[1:]:
            for parameter in block.values():
                parameter.requires_grad_(False)
