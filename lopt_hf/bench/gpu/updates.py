"""How far the changes that two training runs made to the same weights differ."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Comparison", "compare", "save_updates"]

_LOSS_TOLERANCE = 1e-4
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Comparison:
    """What a run is compared with.

    Attributes:
        reference: The `saved_as` of another run.
        tolerance: Largest relative difference of the changes, `||a - b|| / ||b||`, over the decoder layers and what is
            outside of them; and of the losses, which are logged with four digits behind the point.
        of_losses: Whether the losses are compared. One backward for all losses has them logged as one sum.
    """

    reference: str
    tolerance: float
    of_losses: bool = True


def save_updates(path: Path, updates: Mapping[str, "torch.Tensor"], losses: Sequence[float]) -> None:
    """Keeps how a run changed each weight, and its loss at each step."""
    import torch

    torch.save({"updates": dict(updates), "losses": list(losses)}, path)


def compare(
    folder: Path, comparison: Comparison, updates: Mapping[str, "torch.Tensor"], losses: Sequence[float]
) -> dict[str, Any]:
    """Compares a run with one that was saved.

    Returns:
        The difference, where it is largest, the largest relative difference of a step's loss if losses are compared,
        and whether all is within the tolerance.

    Raises:
        ValueError: If there is no such run, or if one of the two left some layer as it was, so that nothing is told.
    """
    import torch

    path = folder / f"{comparison.reference}.pt"
    if not path.exists():
        raise ValueError(f"there is no run {comparison.reference!r} to compare with; it failed or was not reached")
    saved = torch.load(path, weights_only=True)
    own, other = _by_layer(updates), _by_layer(saved["updates"])
    if own.keys() != other.keys():
        raise ValueError(f"the runs trained different layers: {sorted(own.keys() ^ other.keys())}")
    still = [name for name in own if not own[name].any() or not other[name].any()]
    if still:
        raise ValueError(f"the weights of {', '.join(still)} have not moved, so there is nothing to compare")
    # Of tensors nan is the largest value, which Python's `max` passes over unless it comes first.
    differences = torch.stack([(own[name] - other[name]).norm() / other[name].norm() for name in own])
    largest = int(differences.argmax())
    values: dict[str, Any] = {
        "compared_with": comparison.reference,
        "difference": float(differences[largest]),
        "largest_in": list(own)[largest],
        "tolerance": comparison.tolerance,
        "is_equal": float(differences[largest]) <= comparison.tolerance,
    }
    if comparison.of_losses:
        pairs = torch.tensor(list(zip(losses, saved["losses"], strict=True)), dtype=torch.float64)
        ours, theirs = pairs.unbind(dim=1)
        values["loss_difference"] = float(((ours - theirs) / theirs).abs().max())
        values["is_equal"] &= values["loss_difference"] <= max(comparison.tolerance, _LOSS_TOLERANCE)
    return values


def _by_layer(updates: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """All changes of a layer as one vector; what is in no layer by its own name."""
    import torch

    layers: dict[str, list[torch.Tensor]] = {}
    for name, update in updates.items():
        match = _LAYER.search(name)
        layers.setdefault(f"layer {match[1]}" if match else name, []).append(update.double().flatten())
    return {name: torch.cat(parts) for name, parts in layers.items()}
