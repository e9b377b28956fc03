"""How many bytes autograd keeps alive for the backward pass."""

from collections.abc import Iterable
from itertools import chain
from threading import RLock
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lopt_hf.common.upstream.torch import storage_key
from lopt_hf.meters.optimizer_bytes import stepped_weights

__all__ = ["SavedBytes"]

_StorageKey = tuple[torch.device, int]


class SavedBytes:
    """Counts the bytes of the storages that autograd keeps alive for the backward pass.

    A storage counts from the moment the first tensor on it is saved until autograd releases the last one; however many
    tensors and views share it, it counts once, and in full, since a view keeps all of it alive. Parameters and buffers
    are not activations: their storages are left out. Their low-precision copies made by autocast are counted, because
    they exist for the backward only.

    The number does not depend on the allocator, on the device or on what else the process holds, so it can be compared
    between methods and machines. What `torch.utils.checkpoint` recomputes is seen in its reentrant form only: the
    non-reentrant form replaces the hooks used here while it recomputes.

    Attributes:
        current: Bytes saved at this moment.
        peak: Largest `current` since the start or the last `reset_peak()`, in bytes.

    Args:
        exclude: Module whose parameters and buffers are left out, or an iterable of tensors to leave out.

    Example:

    ```python
    with SavedBytes(model) as saved:
        model(**batch).loss.backward()
    print(f"{saved.peak / 2**20:.0f} MiB")
    ```
    """

    def __init__(self, exclude: nn.Module | Iterable[torch.Tensor] = ()) -> None:
        self.current = 0
        self.peak = 0
        if isinstance(exclude, nn.Module):
            exclude = chain(exclude.parameters(), exclude.buffers())
        self._excluded_tensors = tuple(exclude)
        self._excluded: frozenset[_StorageKey] = frozenset()
        self._users: dict[_StorageKey, int] = {}
        # Autograd releases what it saved from the device's backward thread, and from wherever a graph is dropped.
        self._lock = RLock()
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    @classmethod
    def of_training(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> "SavedBytes":
        """Makes the counter for a training step, which leaves out the model's tensors and what is stepped.

        Args:
            model: The model.
            optimizer: It may step weights that are not the model's, such as those of local heads.
        """
        return cls(chain(model.parameters(), model.buffers(), stepped_weights(optimizer)))

    def reset_peak(self) -> None:
        """Starts a new peak at what is saved now."""
        with self._lock:
            self.peak = self.current

    def __enter__(self) -> "SavedBytes":
        self._excluded = frozenset(_storage_key(tensor) for tensor in self._excluded_tensors)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: torch.Tensor) -> "_Saved | torch.Tensor":
        key = _storage_key(tensor)
        # Detached: a saved output would otherwise hold its own node, and a graph without a backward would never die.
        tensor = tensor.detach()
        return tensor if key in self._excluded else _Saved(self, key, tensor)

    def _acquire(self, key: _StorageKey, size: int) -> None:
        with self._lock:
            self._users[key] = self._users.get(key, 0) + 1
            if self._users[key] == 1:
                self.current += size
                self.peak = max(self.peak, self.current)

    def _release(self, key: _StorageKey, size: int) -> None:
        with self._lock:
            self._users[key] -= 1
            if self._users[key] == 0:
                del self._users[key]
                self.current -= size


class _Saved:
    """What autograd holds instead of a saved tensor; it dies when autograd lets go of it."""

    __slots__ = ("_key", "_size", "_tracker", "tensor")

    def __init__(self, tracker: SavedBytes, key: _StorageKey, tensor: torch.Tensor) -> None:
        self.tensor = tensor  # keeps the storage, so its key stays unique
        self._tracker = tracker
        self._key = key
        self._size = tensor.untyped_storage().nbytes()
        tracker._acquire(key, self._size)

    def __del__(self) -> None:
        self._tracker._release(self._key, self._size)


def _unpack(saved: _Saved | torch.Tensor) -> torch.Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _storage_key(tensor: torch.Tensor) -> _StorageKey:
    return tensor.device, storage_key(tensor.untyped_storage())
