"""Which deeper layers an auxiliary has."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lopt_hf.local.blocks import Block

__all__ = ["calibrated_leaps", "check_leaps", "even_leaps", "last_leaps", "leap_counts"]


def leap_counts(blocks: Sequence[Block], share: float) -> list[int]:
    """How many layers each early block leaps to: a share of those that follow it, rounded up, at least the last."""
    num_layers = blocks[-1].stop
    return [max(1, math.ceil(share * (num_layers - block.stop))) for block in blocks[:-1]]


def even_leaps(stop: int, num_layers: int, count: int) -> list[int]:
    """Spreads `count` layers over those from `stop` on, the last among them, with gaps as even as can be."""
    following = num_layers - stop
    return [stop - 1 + round(following * (i + 1) / count) for i in range(count)]


def last_leaps(num_layers: int, count: int) -> list[int]:
    """The last `count` layers."""
    return list(range(num_layers - count, num_layers))


def calibrated_leaps(stop: int, num_layers: int, count: int, measure: Callable[[Sequence[int]], float]) -> list[int]:
    """Begins with the last layer and adds, one after the other, the layer with which the loss is lowest.

    Args:
        stop: First layer behind the block.
        num_layers: Number of decoder layers.
        count: How many to choose.
        measure: The local loss at the start with these leapt layers.
    """
    chosen = [num_layers - 1][:count]
    while len(chosen) < count:
        others = (index for index in range(stop, num_layers) if index not in chosen)
        chosen = min((sorted([*chosen, index]) for index in others), key=measure)
    return chosen


def check_leaps(leap_layers: Sequence[Any], blocks: Sequence[Block]) -> None:
    """Raises if given leaps don't fit a model.

    Raises:
        ValueError: If there are more of them than layers that follow, or if indices are not increasing, not behind
            their block, or without the last layer.
    """
    num_layers = blocks[-1].stop
    for block, entry in zip(blocks[:-1], leap_layers, strict=True):
        where = f"leap_layers={entry} of block {block.index} (layers {block.start} to {block.stop - 1})"
        if isinstance(entry, int):
            if entry > num_layers - block.stop:
                raise ValueError(f"{where} is more than the {num_layers - block.stop} layers that follow; lower it.")
            continue
        if entry and entry[-1] != num_layers - 1:
            raise ValueError(f"{where} must end with the last layer, {num_layers - 1}.")
        if any(later <= earlier for earlier, later in zip([block.stop - 1, *entry], entry, strict=False)):
            raise ValueError(f"{where} must be increasing indices of layers from {block.stop} on.")
