"""What a second run of a part of the model shares with the first: autocast, running statistics."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lopt_hf.common.upstream.torch import BatchNorm

__all__ = ["autocast_of", "changed_between", "relative_difference", "running_statistics_kept"]


def autocast_of(device_type: str) -> dict[str, Any]:
    """Returns the arguments of the autocast context that a device is in."""
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


@contextlib.contextmanager
def running_statistics_kept(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Lets batch norms that train leave their running statistics alone: the first run has moved them already.

    Args:
        layers: The modules whose batch norms are meant.
    """
    norms = [m for layer in layers for m in layer.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    moving = [norm for norm in norms if norm.training]
    for norm in moving:
        norm.track_running_stats = False  # the statistics of the batch are used in either case
    try:
        yield
    finally:
        for norm in moving:
            norm.track_running_stats = True


def relative_difference(first: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
    """Returns the norm of the difference of two runs' outputs relative to that of the first."""
    first, again = first.detach().float(), again.detach().float()
    return torch.linalg.vector_norm(again - first) / torch.linalg.vector_norm(first)


def changed_between(where: str) -> str:
    """Returns what to say where hidden states are not what the part before has returned."""
    return (
        f"{where} the decoder changes the hidden states, which a block that runs again by itself would miss; set "
        "reach_recompute to False, and please report the architecture."
    )
