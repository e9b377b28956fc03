"""What the package takes from the inside of torch's FSDP2: whose forward it takes to be under way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.fsdp import FSDPModule

from lopt_hf.common.upstream.torch import TORCH

__all__ = ["forward_goes_on"]

with TORCH.names():
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState, FSDPStateContext

TORCH.check(FSDPModule, "_get_fsdp_state")
TORCH.check(FSDPState(), "_state_ctx")
TORCH.check(FSDPStateContext(), "iter_forward_root")


@contextmanager
def forward_goes_on(model: FSDPModule) -> Iterator[None]:
    """Lets a backward that runs in this block, within a model's forward, leave that forward under way.

    For FSDP2 the end of a backward is the end of its forward. The next unit would then take itself for the root, of
    whose forward the end waits for all-gathers: from there on none would overlap another layer's work.

    Args:
        model: The root of the units, or a model that runs no forward at the moment.
    """
    state: Any = model._get_fsdp_state()
    context = state._state_ctx
    root = context.iter_forward_root
    try:
        yield
    finally:
        context.iter_forward_root = root
