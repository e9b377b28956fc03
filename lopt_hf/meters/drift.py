"""How far training has moved each block's weights."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

__all__ = ["WeightDrift", "relative_drift"]


def relative_drift(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Returns `||W - W0|| / ||W0||` over all weights together; 0 where `W0` is nothing or 0.

    Args:
        pairs: Each weight as it was, and as it is.
    """
    moved = total = 0.0
    for before, after in pairs:
        moved += (after.double() - before.double()).square().sum().item()
        total += before.double().square().sum().item()
    return (moved / total) ** 0.5 if total else 0.0


class WeightDrift:
    """Relative drift `||W - W0|| / ||W0||` of each block's trainable parameters since this object was made.

    Args:
        owned: For each block, its parameters by name (`parameters_by_block`). Their trainable ones are copied to host
            memory.
    """

    def __init__(self, owned: Sequence[Mapping[str, nn.Parameter]]) -> None:
        self._start = [
            {name: parameter.detach().cpu().clone() for name, parameter in block.items() if parameter.requires_grad}
            for block in owned
        ]

    def measure(self, owned: Sequence[Mapping[str, nn.Parameter]]) -> list[float]:
        """Returns the drift of each block; 0 for one without trainable parameters."""
        return [
            relative_drift((before, now[name].detach().cpu()) for name, before in start.items())
            for start, now in zip(self._start, owned, strict=True)
        ]
