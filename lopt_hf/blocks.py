"""Blocks under the name that they had before `lopt_hf.local`; scripts of users import it."""

from lopt_hf.local.blocks import Block, split_layers
from lopt_hf.local.embeddings import untie_output_embeddings
from lopt_hf.local.ownership import parameters_by_block
from lopt_hf.local.stacks import DecoderStack, check_architecture, find_decoder_stack

__all__ = [
    "Block",
    "DecoderStack",
    "check_architecture",
    "find_decoder_stack",
    "parameters_by_block",
    "split_layers",
    "untie_output_embeddings",
]
