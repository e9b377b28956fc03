"""Surrogates fitted one behind the other, and layers behind them fitted anew.

Shapes: B batch, T tokens, D hidden channels, K inputs of a layer's down projection.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.common.ridge import LinearRidge
from lopt_hf.local.layer_calls import evaluating, layer_inputs, stop_behind
from lopt_hf.repl.calibration import (
    Batches,
    SpanStates,
    add_states,
    check_finite,
    forward_base,
    from_layer,
    kept_tokens,
    make_fit,
    reading,
    run_operator,
    select_tokens,
)
from lopt_hf.repl.folding import add_to_projection
from lopt_hf.repl.modeling_repl import find_layers
from lopt_hf.repl.neighbours import Neighbour
from lopt_hf.repl.operator_base import Operator
from lopt_hf.repl.placement import Span

__all__ = ["calibrate"]

Beside = tuple[Neighbour, Neighbour]


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    operators: Mapping[Span, Operator],
    neighbours: Mapping[Span, Beside],
    batches: Batches,
    ridge: float,
    refit_behind: int = 0,
) -> None:
    """Sets the coefficients of all operators, from the lowest span on, each behind those already fitted.

    The target of each is the output of its own removed layers on the input that it will see. The layers below a fitted
    surrogate run once: its inputs are kept in temporary files, so that memory does not grow with the data.

    Args:
        model: The model with all its layers.
        operators: The operator for each span of layers to replace.
        neighbours: The layers before and behind each.
        batches: Model inputs.
        ridge: See `RepLConfig.ridge`.
        refit_behind: See `RepLConfig.refit_behind`.

    Raises:
        FloatingPointError: If the model's hidden states are not finite.
    """
    layers = find_layers(model)
    spans = sorted(operators)
    start: int = 0  # what is below layer `start` is done: its input follows from the files
    below: tuple[Operator, Beside] | None = None
    # The layer before the next span has its surrogate in it, and is fitted with that.
    ends = [*(first - 1 for first, _ in spans[1:]), len(layers)]
    with evaluating(model), TemporaryDirectory() as folder:
        for span, end in zip(spans, ends, strict=True):
            behind = min(refit_behind, end - span[1])
            fit = make_fit(operators[span], neighbours[span], ridge)
            for number, batch in enumerate(batches):
                file = f"{folder}/{number}.pt"
                resumed = None
                if below is not None:
                    h_BTD, read_BTK, _ = torch.load(file, weights_only=True)
                    resumed = run_operator(*below, h_BTD, read_BTK)
                with from_layer(layers, start, resumed):
                    seen, targets = _span_states(model, layers, span, batch, operators[span], neighbours[span], behind)
                torch.save((seen.h_BTD, seen.read_BTK, targets), file)
                add_states(fit, seen, kept_tokens(batch))
            fit.finish()
            start, below = span[1], (operators[span], neighbours[span])
            if behind:
                _refit(model, range(span[1], span[1] + behind), below, batches, ridge, folder)


def _span_states(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    span: Span,
    batch: Mapping[str, torch.Tensor],
    operator: Operator,
    beside: Beside,
    behind: int,
) -> tuple[SpanStates, list[torch.Tensor]]:
    """Hidden states before and behind a span, and behind each of some layers that follow; the forward ends there."""
    last = span[1] - 1 + behind
    with (
        layer_inputs(layers, [span[0], *range(span[1], last + 1)]) as inputs,
        reading(operator, beside[0]) as read,
        stop_behind(layers[last]) as ended,
    ):
        forward_base(model, batch)
    h_BTD, *outputs = [*inputs.values(), ended[0][1]]
    check_finite(h_BTD, *outputs)
    read_BTK = read[0].view(*h_BTD.shape[:-1], -1) if read else h_BTD
    return SpanStates(h_BTD, outputs[0], read_BTK), outputs[1:]


def _refit(
    model: PreTrainedModel,
    numbers: Sequence[int],
    below: tuple[Operator, Beside],
    batches: Batches,
    ridge: float,
    folder: str,
) -> None:
    """Fits the last MLP projection of each of some layers anew, to what the layer put out before.

    Args:
        model: The model with all its layers.
        numbers: The layers, one behind the other, the first right behind a span.
        below: The span's fitted surrogate, with the layers beside it.
        batches: Model inputs.
        ridge: See `RepLConfig.ridge`.
        folder: Has the states of each batch before the span, and the layers' outputs.
    """
    layers = find_layers(model)
    added: Any = None  # what the latest fit adds to its layer's output
    for offset, number in enumerate(numbers):
        neighbour = Neighbour(layers[number], model.config, model.config.model_type)
        projection = neighbour.down()
        size, inputs = projection.weight.shape
        sums = LinearRidge(inputs, ridge, projection.weight.device, size, projection.bias is not None)
        for index, batch in enumerate(batches):
            file = f"{folder}/behind-{index}.pt"
            h_BTD, read_BTK, targets = torch.load(f"{folder}/{index}.pt", weights_only=True)
            if added is None:
                input_BTD = run_operator(*below, h_BTD, read_BTK)
            else:
                output_BTD, inner_BTK = torch.load(file, weights_only=True)
                input_BTD = output_BTD + added(inner_BTK)
            with (
                from_layer(layers, number, input_BTD),
                _inputs_of(neighbour.down_module()) as inner,
                stop_behind(layers[number]) as seen,
            ):
                forward_base(model, batch)
            output_BTD = seen[0][1]
            check_finite(output_BTD)
            inner_BTK = inner[0].view(*output_BTD.shape[:-1], -1)
            torch.save((output_BTD, inner_BTK), file)
            mask_BT = kept_tokens(batch)
            missing_BTD = targets[offset] - output_BTD
            sums.add(select_tokens(inner_BTK, mask_BT).float(), select_tokens(missing_BTD, mask_BT).float())
        fitted_FD = sums.solve().to(projection.weight)
        has_bias = projection.bias is not None
        weight_DK, bias_D = (fitted_FD[:-1].T, fitted_FD[-1]) if has_bias else (fitted_FD.T, None)
        added = partial(nn.functional.linear, weight=weight_DK, bias=bias_D)
        add_to_projection(neighbour.down_module(), weight_DK, bias_D)


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Records what a module is given."""
    seen: list[torch.Tensor] = []
    with module.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        yield seen
