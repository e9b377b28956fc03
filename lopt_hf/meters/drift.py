"""How far training has moved each block's weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

__all__ = ["WeightDrift"]


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
        return [self._block_drift(start, now) for start, now in zip(self._start, owned, strict=True)]

    def _block_drift(self, start: Mapping[str, torch.Tensor], now: Mapping[str, nn.Parameter]) -> float:
        moved = total = 0.0
        for name, before in start.items():
            moved += (now[name].detach().cpu() - before).double().square().sum().item()
            total += before.double().square().sum().item()
        return (moved / total) ** 0.5 if total else 0.0
