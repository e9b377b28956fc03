"""Blocks under the name that they had before `lopt_hf.local`; scripts of users import it."""

from lopt_hf.local.blocks import (
    Block,
    DecoderStack,
    find_decoder_stack,
    is_before_the_layers,
    parameters_by_block,
    split_layers,
    untie_output_embeddings,
)

__all__ = [
    "Block",
    "DecoderStack",
    "find_decoder_stack",
    "is_before_the_layers",
    "parameters_by_block",
    "split_layers",
    "untie_output_embeddings",
]
