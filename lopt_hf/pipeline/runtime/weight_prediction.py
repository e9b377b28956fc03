"""Weights as they will be: a forward whose gradient comes some steps later is to see those that it will move."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

__all__ = ["WeightPrediction"]


class WeightPrediction:
    """The trainable weights of a model some optimizer steps on, if each step changed them as the last one did.

    SpecTrain (arXiv 1809.02839) predicts by the momentum; a difference of weights says the same for any optimizer, and
    with Adam has its scale too. It costs one copy of the trainable weights.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # From `begin` to `end` of a step what is predicted, and from then on what the weights were in that step
        self._weights: dict[str, torch.Tensor] = {}

    def begin(self, num_steps: int) -> None:
        """Begins an optimizer step, whose forwards are to see the weights behind some more.

        Args:
            num_steps: How many.
        """
        for name, now in self._trainable():
            if name not in self._weights:  # nothing is known of the first step
                self._weights[name] = now.clone()
            else:
                self._weights[name].sub_(now).mul_(-num_steps).add_(now)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Makes a context in which the model has the predicted weights."""
        own = {name: parameter.data for name, parameter in self._model.named_parameters() if name in self._weights}
        self._put(self._weights)
        try:
            yield
        finally:
            self._put(own)

    def end(self) -> None:
        """Ends the forwards of a step; its optimizer has not moved the weights yet."""
        for name, now in self._trainable():
            self._weights[name].copy_(now)

    @property
    def num_bytes(self) -> int:
        """Bytes of the copy."""
        return sum(weight.nbytes for weight in self._weights.values())

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: the weights of the step that has ended, by their names."""
        return self._weights

    def load_state(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `state` returned."""
        self._weights = dict(weights)

    def _trainable(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.detach()

    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        parameters = dict(self._model.named_parameters())
        for name, weight in weights.items():
            parameters[name].data = weight  # by reference: graphs and the optimizer go on with the parameter itself
