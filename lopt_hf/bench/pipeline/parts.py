"""Where the pipelines of a comparison cut the model: stages, and their parts for schedules with two on a rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from lopt_hf.pipeline.split.model_costs import ModelCosts

__all__ = ["Cut", "divide_stages"]


@dataclass(frozen=True)
class Cut:
    """Where the pipelines of a comparison cut the model; lists have the first layer of every part but the first.

    Attributes:
        split_at: The stages of all methods but the one below.
        parts_at: Their parts: `split_at`, and where a schedule of the run has two stages on a rank, the middle of each
            stage.
        rerun_at: The stages of a pipeline whose early ones run forward a second time, for a gradient that comes late.
        expected: What each stage of `split_at` is expected to cost, as a table; empty where the cut was not measured.
    """

    split_at: list[int]
    parts_at: list[int]
    rerun_at: list[int]
    expected: str = ""


def divide_stages(
    split_at: Sequence[int], num_layers: int, parts_per_stage: int, costs: ModelCosts | None = None
) -> list[int]:
    """Divides each stage of a cut into halves.

    So a rank has as much to do with one half of each of two stages as with both of one, and all methods cut the model
    at the same layers.

    Args:
        split_at: First layer of every stage but the first.
        num_layers: Layers of the model.
        parts_per_stage: 1 to leave the stages whole, 2 to halve them.
        costs: Where given, the slower half is as fast as can be, end-to-end; otherwise halves have equal layers.

    Returns:
        The first layer of every part but the first.

    Raises:
        ValueError: If a stage to halve has one layer only.
    """
    if parts_per_stage == 1:
        return list(split_at)
    edges = [0, *split_at, num_layers]
    parts_at: list[int] = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        if stop - start < 2:
            raise ValueError(
                f"split_at={list(split_at)}: the stage with layer {start} alone cannot be two stages of a rank; give "
                "every stage at least 2 layers, or leave out the methods with two stages on a rank."
            )
        parts_at += [*[start] * (start > 0), _middle(start, stop, costs)]
    return parts_at


def _middle(start: int, stop: int, costs: ModelCosts | None) -> int:
    if costs is None:
        return (start + stop) // 2
    return min(
        range(start + 1, stop), key=lambda middle: max(_seconds(costs, start, middle), _seconds(costs, middle, stop))
    )


def _seconds(costs: ModelCosts, start: int, stop: int) -> float:
    """What a part costs end-to-end, where it has no local objective."""
    stage = costs.stage(start, stop)
    return stage.total - stage.local
