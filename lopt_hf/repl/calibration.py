"""Surrogates that imitate the layers they replace, fitted in closed form on a few thousand tokens.

Shapes: N tokens, D hidden channels, K features.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.common.ridge import ChannelRidge, LinearRidge, SharedRidge
from lopt_hf.local.layer_calls import evaluating, hidden_of, output_hidden
from lopt_hf.repl.map_operators import MLPMap, Patch, Scale, rotation
from lopt_hf.repl.modeling_repl import find_layers, normalise
from lopt_hf.repl.neighbours import Affine, Neighbour
from lopt_hf.repl.operator_base import Operator
from lopt_hf.repl.operators import Branches, Linear, prior_of

__all__ = [
    "Batches",
    "SpanStates",
    "add_states",
    "block_influence",
    "check_finite",
    "forward_base",
    "from_layer",
    "kept_tokens",
    "make_fit",
    "reading",
    "run_operator",
    "select_tokens",
]

Batches = Sequence[Mapping[str, torch.Tensor]]
TOKENS_AT_ONCE = 512  # bounds the memory of the features of all branches; no effect on the result


def run_operator(
    operator: Operator, beside: tuple[Neighbour, Neighbour], h_BTD: torch.Tensor, read_BTK: torch.Tensor
) -> torch.Tensor:
    """What the layer behind a span is given: `h_BTD` are the hidden states before the span, without the surrogate."""
    made = operator(read_BTK, *beside)
    return h_BTD + made if isinstance(operator, MLPMap) else made


@dataclass(frozen=True)
class SpanStates:
    """What there is to fit a surrogate to.

    Attributes:
        h_BTD: Hidden states before the span.
        output_BTD: Hidden states behind it.
        read_BTK: What the surrogate reads: the same as `h_BTD`, or the MLP's output or inner activations.
    """

    h_BTD: torch.Tensor
    output_BTD: torch.Tensor
    read_BTK: torch.Tensor


@contextmanager
def reading(operator: Operator, previous: Neighbour) -> Iterator[list[torch.Tensor]]:
    """Records what a surrogate reads inside the layer before its span; nothing if it reads hidden states."""
    read: list[torch.Tensor] = []
    if not isinstance(operator, MLPMap):
        yield read
        return

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        read.append(args[0] if operator.reads_input else output_hidden(output))

    with operator.place(previous).register_forward_hook(keep):
        yield read


def check_finite(*tensors: torch.Tensor) -> None:
    """Checks hidden states that something is fitted to, or chosen by.

    Raises:
        FloatingPointError: If they are not finite.
    """
    if not all(torch.isfinite(value).all() for value in tensors):
        raise FloatingPointError(
            "The hidden states of the calibration data are not finite, so nothing can be fitted to them or chosen by "
            "them; load the model in another dtype, or check the data."
        )


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Batches) -> list[float]:
    """For each layer `1 - cos` of its input and output, averaged over tokens (Men et al., arXiv 2403.03853, Eq 1).

    Raises:
        FloatingPointError: If the model's hidden states are not finite.
    """
    layers = find_layers(model)
    totals = [0.0] * len(layers)
    tokens = [0] * len(layers)

    def add(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output_BTD: torch.Tensor) -> None:
        h_ND, output_ND = (select_tokens(value, mask_BT) for value in (hidden_of(args, kwargs), output_BTD))
        check_finite(h_ND, output_ND)
        changes = 1 - nn.functional.cosine_similarity(h_ND.float(), output_ND.float(), dim=-1)
        totals[index] += changes.sum().item()
        tokens[index] += changes.numel()

    with evaluating(model), ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(partial(add, index), with_kwargs=True))
        for batch in batches:
            mask_BT = kept_tokens(batch)
            forward_base(model, batch)
    return [total / count for total, count in zip(totals, tokens, strict=True)]


class _Done(nn.Module):
    """In place of a layer that need not run again: gives what it is given, or what follows from an earlier run."""

    def __init__(self, output_BTD: torch.Tensor | None = None) -> None:
        super().__init__()
        self.output_BTD = output_BTD

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states if self.output_BTD is None else self.output_BTD


@contextmanager
def from_layer(layers: nn.ModuleList, start: int, resumed_BTD: torch.Tensor | None) -> Iterator[None]:
    """Lets the model's own forward begin at layer `start`, with `resumed_BTD` as that layer's input."""
    originals = list(layers[:start])
    try:
        for index in range(start):
            layers[index] = _Done(resumed_BTD if index == start - 1 else None)
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


def forward_base(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """Runs a model without its head."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    uses_cache = "use_cache" in model.config.get_text_config().to_dict()
    model.base_model(**inputs, **({"use_cache": False} if uses_cache else {}))


def kept_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Returns which tokens are no padding (B, T); `None` for all of them."""
    return batch["attention_mask"].bool() if "attention_mask" in batch else None


def select_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the values (B, T, ...) of the tokens that are no padding, (N, ...)."""
    return values.flatten(0, 1) if mask is None else values[mask.to(values.device)]


def add_states(fit: Any, seen: SpanStates, mask_BT: torch.Tensor | None) -> None:
    """Adds a batch to a fit, without padding."""
    flat = [select_tokens(value, mask_BT).float() for value in (seen.h_BTD, seen.output_BTD, seen.read_BTK)]
    for h, output, read in zip(*(value.split(TOKENS_AT_ONCE) for value in flat), strict=True):
        fit.add(read, output - h)


def make_fit(operator: Operator, beside: tuple[Neighbour, Neighbour], ridge: float) -> Any:
    """Makes what sets an operator's coefficients: `add` takes what it reads and what is to be added."""
    kinds: dict[type, Any] = {Linear: _LinearFit, Scale: _ScaleFit, Patch: _PatchFit}
    if isinstance(operator, MLPMap):
        return _MapFit(operator, ridge)
    return kinds.get(type(operator), _CoefficientFit)(operator, *beside, ridge)


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


class _MapFit:
    """Fits a map in the MLP before the span, towards adding nothing."""

    def __init__(self, operator: MLPMap, ridge: float) -> None:
        self.operator = operator
        outputs, inputs = operator.coefficients.shape
        has_bias = operator.bias is not None
        self.sums = LinearRidge(inputs, ridge, operator.coefficients.device, outputs, has_bias)

    def add(self, read_NK: torch.Tensor, added_ND: torch.Tensor) -> None:
        self.sums.add(read_NK, added_ND)

    def finish(self) -> None:
        fitted_FD = self.sums.solve()
        if self.operator.bias is not None:
            self.operator.bias.data.copy_(fitted_FD[-1])
            fitted_FD = fitted_FD[:-1]
        self.operator.coefficients.data.copy_(fitted_FD.T)


class _ScaleFit:
    """Sets `Scale` to the mean over tokens of how much longer the hidden states get."""

    def __init__(self, operator: Scale, previous: Neighbour, following: Neighbour, ridge: float) -> None:
        self.operator, self.total, self.count = operator, 0.0, 0

    def add(self, h_ND: torch.Tensor, added_ND: torch.Tensor) -> None:
        self.total += ((h_ND + added_ND).norm(dim=1) / h_ND.norm(dim=1)).double().sum().item()
        self.count += len(h_ND)

    def finish(self) -> None:
        self.operator.coefficients.data.fill_(self.total / self.count - 1)


class _PatchFit:
    """Sets `Patch` from the mean absolute value of each rotated channel before and behind the span."""

    def __init__(self, operator: Patch, previous: Neighbour, following: Neighbour, ridge: float) -> None:
        self.operator = operator
        self.rotation_DD = rotation(operator.spec["hidden_size"], operator.coefficients.device)
        self.before_D = torch.zeros_like(self.rotation_DD[0])
        self.behind_D = torch.zeros_like(self.before_D)

    def add(self, h_ND: torch.Tensor, added_ND: torch.Tensor) -> None:
        rotated_ND = h_ND.double() @ self.rotation_DD.T
        self.before_D += rotated_ND.abs().sum(0)
        self.behind_D += (rotated_ND + added_ND.double() @ self.rotation_DD.T).abs().sum(0)

    def finish(self) -> None:
        growth_D = self.behind_D / self.before_D.clamp_min(torch.finfo(torch.float32).tiny)
        patch_DD = self.rotation_DD.T @ ((growth_D - 1)[:, None] * self.rotation_DD)
        self.operator.coefficients.data.copy_(patch_DD)
