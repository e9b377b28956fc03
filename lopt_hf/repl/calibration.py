"""Surrogates that imitate the layers they replace, fitted in closed form on a few thousand tokens.

Shapes: N tokens, D hidden channels, K features.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.common.ridge import ChannelRidge, LinearRidge, SharedRidge
from lopt_hf.local.layer_calls import evaluating, hidden_of, stop_behind
from lopt_hf.repl.modeling_repl import find_layers, normalise
from lopt_hf.repl.neighbours import Affine, Neighbour
from lopt_hf.repl.operator_base import Operator
from lopt_hf.repl.operators import Branches, Linear, prior_of

__all__ = ["block_influence", "calibrate"]

Batches = Sequence[Mapping[str, torch.Tensor]]
TOKENS_AT_ONCE = 512  # bounds the memory of the features of all branches; no effect on the result


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    operators: Mapping[int, Operator],
    neighbours: Mapping[int, tuple[Neighbour, Neighbour]],
    batches: Batches,
    ridge: float,
) -> None:
    """Sets the coefficients of all operators, from the lowest layer on, each behind those already fitted.

    The target of each is the output of its own removed layer on the input that it will see. The layers below a fitted
    surrogate run once: its inputs are kept in temporary files, so that memory does not grow with the data.

    Args:
        model: The model with all its layers.
        operators: The operator for each layer to replace.
        neighbours: Their neighbours.
        batches: Model inputs.
        ridge: See `RepLConfig.ridge`.

    Raises:
        FloatingPointError: If the model's hidden states are not finite.
    """
    layers = find_layers(model)
    start, below = 0, None  # what is below layer `start` is done: its output follows from the files
    with evaluating(model), TemporaryDirectory() as folder:
        for index in sorted(operators):
            kind: Any = _LinearFit if isinstance(operators[index], Linear) else _CoefficientFit
            fit = kind(operators[index], *neighbours[index], ridge)
            for number, batch in enumerate(batches):
                file = f"{folder}/{number}.pt"
                resumed = None if below is None else below[0](torch.load(file, weights_only=True), *below[1])
                with _from_layer(layers, start, resumed):
                    h_BTD, output_BTD = _input_and_output(model, layers[index], batch)
                torch.save(h_BTD, file)
                _add(fit, h_BTD, output_BTD, _kept_tokens(batch))
            fit.finish()
            start, below = index + 1, (operators[index], neighbours[index])


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Batches) -> list[float]:
    """For each layer `1 - cos` of its input and output, averaged over tokens (Men et al., arXiv 2403.03853, Eq 1)."""
    layers = find_layers(model)
    totals = [0.0] * len(layers)
    tokens = [0] * len(layers)

    def add(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output_BTD: torch.Tensor) -> None:
        h_BTD = hidden_of(args, kwargs)
        changes = 1 - _select(nn.functional.cosine_similarity(h_BTD.float(), output_BTD.float(), dim=-1), mask_BT)
        totals[index] += changes.sum().item()
        tokens[index] += changes.numel()

    with evaluating(model), ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(partial(add, index), with_kwargs=True))
        for batch in batches:
            mask_BT = _kept_tokens(batch)
            _forward(model, batch)
    return [total / count for total, count in zip(totals, tokens, strict=True)]


class _Done(nn.Module):
    """In place of a layer that need not run again: gives what it is given, or what follows from an earlier run."""

    def __init__(self, output_BTD: torch.Tensor | None = None) -> None:
        super().__init__()
        self.output_BTD = output_BTD

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states if self.output_BTD is None else self.output_BTD


@contextmanager
def _from_layer(layers: nn.ModuleList, start: int, resumed_BTD: torch.Tensor | None) -> Iterator[None]:
    """Lets the model's own forward begin at layer `start`, with `resumed_BTD` as that layer's input."""
    originals = list(layers[:start])
    try:
        for index in range(start):
            layers[index] = _Done(resumed_BTD if index == start - 1 else None)
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


def _forward(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    uses_cache = "use_cache" in model.config.get_text_config().to_dict()
    model.base_model(**inputs, **({"use_cache": False} if uses_cache else {}))


def _kept_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    return batch["attention_mask"].bool() if "attention_mask" in batch else None


def _select(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values.flatten(0, 1) if mask is None else values[mask.to(values.device)]


def _input_and_output(
    model: PreTrainedModel, layer: nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's input and output; the forward ends there."""
    with stop_behind(layer) as seen:
        _forward(model, batch)
    if not all(torch.isfinite(value).all() for value in seen[0]):
        raise FloatingPointError(
            "The hidden states of the calibration data are not finite, so nothing can be fitted to them; load "
            "the model in another dtype, or check the data."
        )
    return seen[0]


def _add(fit: Any, h_BTD: torch.Tensor, output_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
    """Adds a batch to a fit, without padding."""
    h_ND, output_ND = (_select(value, mask_BT).float() for value in (h_BTD, output_BTD))
    for h, output in zip(h_ND.split(TOKENS_AT_ONCE), output_ND.split(TOKENS_AT_ONCE), strict=True):
        fit.add(h, output - h)


class _CoefficientFit:
    """Fits the coefficients of an operator whose output is linear in them."""

    def __init__(self, operator: Operator, previous: Neighbour, following: Neighbour, ridge: float) -> None:
        self.operator, self.beside = operator, (previous, following)
        rows, columns = operator.coefficients.shape
        device = operator.coefficients.device
        self.sums: SharedRidge | ChannelRidge = (
            ChannelRidge(rows, columns, ridge, device)
            if operator.per_channel
            else SharedRidge(rows * columns, ridge, device)
        )

    def add(self, h_ND: torch.Tensor, added_ND: torch.Tensor) -> None:
        dtype = self.operator.coefficients.dtype
        h_ND = h_ND.to(dtype)
        target_ND = added_ND - self.operator.offset(h_ND, *self.beside).float()
        self.sums.add(self.operator.branch_outputs(h_ND, *self.beside), target_ND)

    def finish(self) -> None:
        coefficients = self.operator.coefficients
        coefficients.data.copy_(self.sums.solve().view_as(coefficients))


class _LinearFit:
    """Fits `Linear`: first the neighbours' value paths per channel, then the whole map towards them."""

    def __init__(self, operator: Linear, previous: Neighbour, following: Neighbour, ridge: float) -> None:
        self.operator, self.beside = operator, (previous, following)
        size, device = operator.spec["hidden_size"], operator.coefficients.device
        self.paths = Branches(previous, following, ["value"], "channel")
        self.prior_sums = ChannelRidge(2, size, ridge, device)
        self.sums = LinearRidge(size, ridge, device)

    def add(self, h_ND: torch.Tensor, added_ND: torch.Tensor) -> None:
        spec = self.operator.spec
        h = h_ND.to(self.operator.coefficients.dtype)
        self.prior_sums.add(self.paths.branch_outputs(h, *self.beside), added_ND)
        self.sums.add(normalise(h_ND, spec["norm"], spec["eps"]), added_ND)

    def finish(self) -> None:
        prior = prior_of(*self.beside, self.prior_sums.solve())
        bias = torch.zeros_like(prior.weight[:, 0]) if prior.bias is None else prior.bias
        fitted_FD = self.sums.solve(torch.cat([prior.weight.T, bias[None]]))
        self.operator.start_from(Affine(fitted_FD[:-1].T, fitted_FD[-1]))
