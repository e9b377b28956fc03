"""How many bytes of gradients parameters hold."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = ["GradientBytes"]


class GradientBytes:
    """Finds the peak of the bytes that parameters hold in `.grad`.

    It looks whenever a backward adds to a gradient, since nothing else makes them more; before it is added, as what
    else looks then may free it. What a backward passes from layer to layer, and buckets on their way between
    processes, are not counted.

    Attributes:
        peak: Largest `current` since the start, in bytes.

    Args:
        parameters: The parameters to look at.

    Example:

    ```python
    with GradientBytes(model.parameters()) as gradients:
        model(**batch).loss.backward()
    print(f"{gradients.peak / 2**20:.0f} MiB")
    ```
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.peak = 0
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def current(self) -> int:
        """Bytes held at this moment; a storage that several gradients share counts once."""
        storages = [p.grad.untyped_storage() for p in self._parameters if p.grad is not None]
        return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())

    def _look(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        added = gradient.nbytes if parameter.grad is None else 0
        self.peak = max(self.peak, self.current + added)

    def __enter__(self) -> "GradientBytes":
        self.peak = self.current
        self._handles = [p.register_hook(partial(self._look, p)) for p in self._parameters]
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
