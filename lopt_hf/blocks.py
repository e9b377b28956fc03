"""Blocks under the name that they had before `lopt_hf.local`; scripts of users import it."""

from lopt_hf.local.blocks import *  # noqa: F403
from lopt_hf.local.blocks import __all__ as _BLOCKS
from lopt_hf.local.ownership import parameters_by_block as parameters_by_block

__all__ = [*_BLOCKS, "parameters_by_block"]
