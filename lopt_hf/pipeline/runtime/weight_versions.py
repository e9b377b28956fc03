"""Weights as they were: a graph whose backward comes after a step is to see those of its forward."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

__all__ = ["WeightVersion", "weights_put_back"]


class WeightVersion:
    """A copy of a model's trainable weights, which graphs keep in place of the weights themselves.

    An optimizer changes weights in place, and autograd refuses a backward through a graph that has kept such a weight
    since. A graph that is made in `kept_by_graphs` keeps the copies; its gradients still go to the weights.

    Attributes:
        weights: The copies by their names in the model.
        saved_bytes: Bytes of the activations that its graphs have kept beside them.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.saved_bytes = 0
        self._copies: dict[int, torch.UntypedStorage] = {}  # by the address of what they are copies of
        # Frozen weights are kept by graphs too, and are there anyway.
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                storage = parameter.untyped_storage()
                copy = self._copies.setdefault(storage.data_ptr(), storage.clone())
                self.weights[name] = _same_part(parameter.detach(), copy)

    @contextlib.contextmanager
    def kept_by_graphs(self) -> Iterator[None]:
        """Makes a context in which graphs keep these weights; the model must still have them."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    @property
    def weight_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.nbytes() for copy in self._copies.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        copy = self._copies.get(storage.data_ptr())
        if copy is not None:
            return _same_part(tensor, copy)
        if storage.data_ptr() not in self._seen:  # a tensor may be kept several times, as views too
            self._seen.add(storage.data_ptr())
            self.saved_bytes += storage.nbytes()
        return tensor


@contextlib.contextmanager
def weights_put_back(model: nn.Module) -> Iterator["_PutWeights"]:
    """Makes a context in which a model may be given other weights, behind which it has its own.

    Args:
        model: The model.
    """
    own = WeightVersion(model)
    try:
        yield _PutWeights(model)
    finally:
        _PutWeights(model)(own.weights)


class _PutWeights:
    """Gives a model weights by their names, in place."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            self._parameters[name].copy_(weight)


def _same_part(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """The view of a copied storage that a tensor is of the original."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
