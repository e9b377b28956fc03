"""Weights as they will be: a forward whose gradient comes some steps later is to see those that it will move."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["WeightPrediction"]


class WeightPrediction:
    """The weights that an optimizer will have made some steps on, as Adam's moments say.

    Each coming step is expected to go where the mean gradient points by now, over the root of the mean square, at its
    own learning rate (XPipe, arXiv 1911.04610). That costs a copy of the weights while the forwards of a step run.

    Args:
        optimizer: Returns the optimizer, which may not be there yet.
        rates: Returns the learning rates of its parameter groups at the optimizer step that is so many steps ahead.
    """

    def __init__(self, optimizer: Callable[[], Optimizer], rates: Callable[[int], Sequence[float]]) -> None:
        self._optimizer = optimizer
        self._rates = rates
        self._weights: list[tuple[nn.Parameter, torch.Tensor]] = []

    @torch.no_grad()
    def begin(self, steps_ahead: Sequence[int]) -> None:
        """Begins an optimizer step, whose forwards are to see the weights behind some steps.

        Args:
            steps_ahead: Which steps, 0 being the one that begins.

        Raises:
            ValueError: If the optimizer keeps no moments as Adam does.
        """
        optimizer = self._optimizer()
        of_steps = [self._rates(ahead) for ahead in steps_ahead]
        for index, group in enumerate(optimizer.param_groups):
            distance = sum(rates[index] for rates in of_steps)
            if distance:
                moved = [parameter for parameter in group["params"] if optimizer.state.get(parameter)]
                self._weights += [(each, each - distance * _direction(optimizer, group, each)) for each in moved]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Makes a context in which the model has the predicted weights."""
        own = [(parameter, parameter.data) for parameter, _ in self._weights]
        _put(self._weights)
        try:
            yield
        finally:
            _put(own)

    def end(self) -> None:
        """Ends the forwards of a step."""
        self._weights = []

    @property
    def num_bytes(self) -> int:
        """Bytes of the copy, between `begin` and `end`."""
        return sum(weight.nbytes for _, weight in self._weights)


def _direction(optimizer: Optimizer, group: dict, parameter: nn.Parameter) -> torch.Tensor:
    state = optimizer.state[parameter]
    if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
        raise ValueError(
            f"weight_prediction=True needs Adam's moments, which {type(optimizer).__name__} does not keep; set it to "
            "False, or choose optim='adamw_torch'."
        )
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    mean = state["exp_avg"] / (1 - beta1**step)
    mean_square = state["exp_avg_sq"] / (1 - beta2**step)
    return mean / (mean_square.sqrt() + group["eps"])


def _put(weights: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for parameter, weight in weights:
        parameter.data = weight  # by reference: graphs and the optimizer go on with the parameter itself
