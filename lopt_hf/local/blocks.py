"""How a model's layers are cut into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "split_layers"]


@dataclass(frozen=True)
class Block:
    """A contiguous run of decoder layers that learns together: layers `start` to `stop - 1`."""

    index: int
    start: int
    stop: int


def split_layers(num_layers: int, num_blocks: int, split_at: Sequence[int] | None = None) -> list[Block]:
    """Cuts `num_layers` decoder layers into blocks.

    Two blocks meet at layer `num_layers // 2` (LoPT paper, Sec. 3); more blocks are even, the first
    `num_layers % num_blocks` of them one layer larger (LoPT code; the paper has two blocks only).

    Args:
        num_layers: Number of decoder layers.
        num_blocks: Number of blocks, at least 2.
        split_at: Index of the first layer of every block but the first, instead of an even split.

    Raises:
        ValueError: If there are fewer than 2 blocks or more blocks than layers, or if `split_at` is not strictly
            increasing within the layers or does not fit `num_blocks`.
    """
    if not 2 <= num_blocks <= num_layers:
        raise ValueError(
            f"num_blocks={num_blocks} does not fit a model with {num_layers} layers; "
            f"choose a number from 2 to {num_layers}."
        )
    if split_at is None:
        cuts = _even_cuts(num_layers, num_blocks)
    else:
        cuts = list(split_at)
        if len(cuts) != num_blocks - 1:
            raise ValueError(
                f"split_at={cuts} cuts the layers into {len(cuts) + 1} blocks, but num_blocks={num_blocks}; "
                f"give {num_blocks - 1} indices or set num_blocks to {len(cuts) + 1}."
            )
        if any(later <= earlier for earlier, later in zip([0, *cuts], [*cuts, num_layers], strict=True)):
            raise ValueError(
                f"split_at={cuts} must be strictly increasing layer indices from 1 to {num_layers - 1} "
                f"for a model with {num_layers} layers."
            )
    edges = [0, *cuts, num_layers]
    return [Block(i, start, stop) for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True))]


def _even_cuts(num_layers: int, num_blocks: int) -> list[int]:
    if num_blocks == 2:
        return [num_layers // 2]
    size, remainder = divmod(num_layers, num_blocks)
    return [i * size + min(i, remainder) for i in range(1, num_blocks)]
