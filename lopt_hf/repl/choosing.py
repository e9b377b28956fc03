"""Which spans go, where that follows from data."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.layer_calls import evaluating, layer_inputs, stop_behind
from lopt_hf.repl.calibration import (
    Batches,
    SpanStates,
    add_states,
    block_influence,
    check_finite,
    forward_base,
    from_layer,
    kept_tokens,
    make_fit,
    reading,
    run_operator,
    select_tokens,
)
from lopt_hf.repl.config import MLP_OPERATORS, RepLConfig
from lopt_hf.repl.modeling_repl import find_layers
from lopt_hf.repl.neighbours import Neighbour
from lopt_hf.repl.operator_base import Operator
from lopt_hf.repl.operators import MeanMLP
from lopt_hf.repl.placement import Span, candidate_spans, least_influence, least_influence_spans, runs_of

__all__ = [
    "check_count",
    "check_enough_tokens",
    "check_operator",
    "check_refit_behind",
    "choose_spans",
    "fit_and_measure",
    "layer_kinds",
    "span_angles",
]

HELD_OUT = 8  # one sequence in so many measures a span's error, the others are what its surrogate is fitted to
Surrogate = tuple[Operator, tuple[Neighbour, Neighbour]]


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """What each layer is: its type of attention where the config names one, and the class of its MLP."""
    config = model.config.get_text_config().to_dict()
    kinds = []
    for index, layer in enumerate(find_layers(model)):
        named = [config[name][index] for name in ("layer_types", "mlp_layer_types") if config.get(name)]
        mlp = dict(layer.named_children()).get("mlp")
        kinds.append(" with ".join([*named, *([] if mlp is None else [type(mlp).__name__])]))
    return kinds


def check_count(config: RepLConfig, kinds: Sequence[str]) -> None:
    """Checks that a model has the layers that a placement asks for.

    Raises:
        ValueError: If it has not.
    """
    count = config.num_layers_to_replace
    assert count is not None
    if config.placement == "span":
        candidate_spans(count, kinds)
    elif config.placement == "influence":
        least_influence_spans([0.0] * len(kinds), count, kinds)
    else:
        least_influence([0.0] * len(kinds), count)


def check_operator(config: RepLConfig, model: PreTrainedModel) -> None:
    """Checks that an operator in the MLP before a span fits wherever the data may put the span.

    Raises:
        ValueError: If there is a layer whose MLP it does not fit.
    """
    if config.operator in MLP_OPERATORS:
        for layer in find_layers(model)[:-2]:  # a span ends before the last layer and begins behind one of these
            neighbour = Neighbour(layer, model.config, model.config.model_type)
            neighbour.check_down(config.operator, experts=config.operator != "refit")


def check_refit_behind(config: RepLConfig, model: PreTrainedModel) -> None:
    """Checks that all layers have a projection that `refit_behind` can fit anew.

    Raises:
        ValueError: If one has not.
    """
    for index, layer in enumerate(find_layers(model) if config.refit_behind > 0 else ()):
        if Neighbour(layer, model.config, model.config.model_type).experts is not None:
            raise ValueError(
                f"refit_behind={config.refit_behind} fits one MLP's last projection, but in layer {index} that is a "
                "mixture of experts; set it to 0."
            )


def check_enough_tokens(config: RepLConfig, model: PreTrainedModel, batches: Batches) -> None:
    """Checks that calibration data determine the map of an operator in an MLP.

    Raises:
        ValueError: If they have fewer tokens than it has inputs.
    """
    if config.operator not in MLP_OPERATORS or config.init != "calibrate":
        return
    tokens = sum(_count_tokens(batch, model.config) for batch in batches)
    layers = find_layers(model)
    middle = Neighbour(layers[len(layers) // 2], model.config, model.config.model_type)
    is_refit = (config.operator == "refit" or config.refit_behind > 0) and middle.experts is None
    width = middle.down().weight.shape[1] if is_refit else middle.output().weight.shape[0]
    behind = f" with refit_behind={config.refit_behind}" if config.refit_behind > 0 else ""
    if tokens < width:
        raise ValueError(
            f"calibration_data has {tokens} tokens, but operator={config.operator!r}{behind} fits a map of {width} "
            "inputs; "
            f"give at least {width} tokens, some thousand better (of which calibration_tokens="
            f"{config.calibration_tokens} are used at most)."
        )


def _count_tokens(batch: Mapping[str, torch.Tensor], config: Any) -> int:
    mask_BT = kept_tokens(batch)
    if mask_BT is not None:
        return int(mask_BT.sum())
    if "pixel_values" in batch:  # (B, channels, height, width)
        images = batch["pixel_values"]
        patches = math.prod(side // config.patch_size for side in images.shape[-2:])
        return len(images) * (patches + 1)  # and the class token
    return math.prod(next(iter(batch.values())).shape[:2])  # (B, T), or (B, T, D) of embeddings


@torch.no_grad()
def choose_spans(
    model: PreTrainedModel, config: RepLConfig, batches: Batches, make: Callable[[Span], Surrogate]
) -> tuple[list[Span], dict[Span, Operator]]:
    """Chooses spans by a placement that goes by data.

    Args:
        model: The model with all its layers.
        config: Says how.
        batches: Calibration data.
        make: Makes a surrogate for a span, with the layers before and behind it.

    Returns:
        The spans, and those surrogates that the choice has fitted to all of the data, as `calibrate` would.

    Raises:
        ValueError: If there are too few sequences to hold some out.
        FloatingPointError: If the model's hidden states are not finite.
    """
    count, kinds = config.num_layers_to_replace, layer_kinds(model)
    assert count is not None
    some = batches[: max(1, len(batches) // 4)]  # a ranking of layers needs less data than a fit
    if config.placement == "block_influence":
        return runs_of(least_influence(block_influence(model, some), count)), {}
    if config.placement == "influence":
        return least_influence_spans(block_influence(model, some), count, kinds), {}
    spans = candidate_spans(count, kinds)
    if config.span_criterion == "error":
        surrogates = {span: make(span) for span in spans}
        costs, fits = fit_and_measure(model, surrogates, batches, config.ridge)
        best = spans[min(range(len(spans)), key=costs.__getitem__)]
        if best not in fits or config.operator == "refit" or config.init != "calibrate" or config.refit_behind:
            return [best], {}
        fits[best].finish()
        return [best], {best: surrogates[best][0]}
    if config.span_criterion == "angle":
        costs = span_angles(model, spans, some)
    else:
        influence = block_influence(model, some)
        costs = [sum(influence[first:end]) for first, end in spans]
    return [spans[min(range(len(spans)), key=costs.__getitem__)]], {}


@torch.no_grad()
def span_angles(model: PreTrainedModel, spans: Sequence[Span], batches: Batches) -> list[float]:
    """For each span the angle between the hidden states before and behind it, as a share of pi, averaged over tokens.

    Source: Gromov et al., arXiv 2403.17887, who take the last token of each sequence only.

    Raises:
        FloatingPointError: If the model's hidden states are not finite.
    """
    totals, tokens = [0.0] * len(spans), 0
    layers = find_layers(model)
    with evaluating(model), layer_inputs(layers, range(len(layers) + 1)) as states:
        for batch in batches:
            forward_base(model, batch)
            h_LND = torch.stack([select_tokens(h_BTD, kept_tokens(batch)).float() for h_BTD in states.values()])
            check_finite(h_LND)
            for index, (first, end) in enumerate(spans):
                cosines_N = nn.functional.cosine_similarity(h_LND[first], h_LND[end], dim=-1)
                totals[index] += (cosines_N.clamp(-1, 1).acos() / math.pi).sum().item()
            tokens += h_LND.shape[1]
    return [total / tokens for total in totals]


@torch.no_grad()
def fit_and_measure(
    model: PreTrainedModel, surrogates: Mapping[Span, Surrogate], batches: Batches, ridge: float
) -> tuple[list[float], dict[Span, Any]]:
    """Measures how far off the model's last hidden states are with each span's surrogate, on data held out of the fit.

    The error is 1 - cos, since the last norm divides by the length, averaged over tokens. What a surrogate misses
    counts by what the layers behind it make of it: right behind the span, low spans have small errors, which grow. All
    surrogates are fitted in one pass over the data; then the layers behind each run once on the data held out.

    Args:
        model: The model with all its layers.
        surrogates: For each span its surrogate, whose coefficients are set, and the layers beside it.
        batches: Calibration data.
        ridge: See `RepLConfig.ridge`.

    Returns:
        The errors; and the fits, which by then have seen the held-out data too, and have set nothing by them.

    Raises:
        ValueError: If there are fewer than two sequences.
    """
    fitted_to, measured_on = _split(batches)
    layers = find_layers(model)
    fits = {
        span: make_fit(*surrogate, ridge)
        for span, surrogate in surrogates.items()
        if not isinstance(surrogate[0], MeanMLP)  # which has nothing to fit
    }
    for batch, seen, _ in _all_states(model, surrogates, fitted_to):
        for span, fit in fits.items():
            add_states(fit, seen[span], kept_tokens(batch))
    for fit in fits.values():
        fit.finish()
    totals, tokens = dict.fromkeys(surrogates, 0.0), 0
    for batch, seen, last_BTD in _all_states(model, surrogates, measured_on):
        for span, (operator, beside) in surrogates.items():
            made_BTD = run_operator(operator, beside, seen[span].h_BTD, seen[span].read_BTK)
            with evaluating(model), from_layer(layers, span[1], made_BTD), stop_behind(layers[-1]) as ended:
                forward_base(model, batch)
            cosine_BT = nn.functional.cosine_similarity(ended[0][1].float(), last_BTD.float(), dim=-1)
            error_N = select_tokens(1 - cosine_BT, kept_tokens(batch))
            totals[span] += error_N.sum().item()
            if span in fits:
                add_states(fits[span], seen[span], kept_tokens(batch))
        tokens += len(error_N)
    return [total / tokens for total in totals.values()], fits


def _split(batches: Batches) -> tuple[Batches, Batches]:
    """Sequences to fit to and sequences to measure on, in batches as they came."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    number = 0
    for batch in batches:
        rows = len(next(iter(batch.values())))
        is_held_out = (torch.arange(number, number + rows) + 1) % HELD_OUT == 0
        number += rows
        for part, chosen in zip(parts, (~is_held_out, is_held_out), strict=True):
            if chosen.any():
                part.append({name: value[chosen.to(value.device)] for name, value in batch.items()})
    if not parts[1]:
        raise ValueError(
            f"calibration_data has {number} sequences, but span_criterion='error', the default, measures on every "
            f"{HELD_OUT}th that it does not fit to; give more data, or shorten calibration_seq_length, or choose "
            "'angle'."
        )
    return parts


def _all_states(
    model: PreTrainedModel, surrogates: Mapping[Span, Surrogate], batches: Batches
) -> Iterator[tuple[Mapping[str, torch.Tensor], dict[Span, SpanStates], torch.Tensor]]:
    """Each batch with what there is to fit each span's surrogate to, and with the last layer's output."""
    layers = find_layers(model)
    for batch in batches:
        with evaluating(model), layer_inputs(layers, range(len(layers) + 1)) as states, ExitStack() as stack:
            read = {span: stack.enter_context(reading(made, beside[0])) for span, (made, beside) in surrogates.items()}
            forward_base(model, batch)
        check_finite(*states.values())
        seen = {}
        for (first, end), values in read.items():
            h_BTD = states[first]
            own = values[0].view(*h_BTD.shape[:-1], -1) if values else h_BTD
            seen[first, end] = SpanStates(h_BTD, states[end], own)
        yield batch, seen, states[len(layers)]
