"""Placement of surrogates: spans of layers of one kind, never the first or the last layer, with a layer between them.

A span is `(first, end)`, layers from 0, without the end.
"""

from collections.abc import Sequence

from lopt_hf.repl.config import RepLConfig

__all__ = [
    "Span",
    "candidate_spans",
    "check_layers",
    "check_spans",
    "every_kth",
    "least_influence",
    "least_influence_spans",
    "named_spans",
    "runs_of",
]

Span = tuple[int, int]


def _check_enough(num_layers: int) -> None:
    """Checks that a model has a layer between its first and its last.

    Raises:
        ValueError: If it has none.
    """
    if num_layers < 3:
        raise ValueError(
            f"num_hidden_layers={num_layers}: the first and the last layer are kept, so none can be replaced; use a "
            "model with 3 or more."
        )


def every_kth(num_layers: int, every: int) -> list[int]:
    """Layers K, 2K, ... counted from 1 (paper), as numbers from 0; the last layer stays.

    Raises:
        ValueError: If there is no such layer.
    """
    _check_enough(num_layers)
    chosen = list(range(every - 1, num_layers - 1, every))
    if not chosen:
        raise ValueError(f"every={every} chooses none of {num_layers} layers; use at most {num_layers - 1}.")
    return chosen


def least_influence(influence: Sequence[float], count: int) -> list[int]:
    """The `count` layers, no two adjacent, whose influence adds up to the least.

    Args:
        influence: One value for each layer of the model.
        count: How many to choose.

    Raises:
        ValueError: If the model has too few layers.
    """
    _check_enough(len(influence))
    most = (len(influence) - 1) // 2
    if not 1 <= count <= most:
        raise ValueError(
            f"num_layers_to_replace={count} does not fit a model with {len(influence)} layers, of which neither the "
            f"first, nor the last, nor two neighbours are replaced; choose a number from 1 to {most}."
        )
    # best[c]: least sum and choice of c layers among those seen; `before` the same without the newest layer.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    before = dict(best)
    for layer in range(1, len(influence) - 1):
        with_it = {c + 1: (total + influence[layer], (*chosen, layer)) for c, (total, chosen) in before.items()}
        before = dict(best)
        for c, candidate in with_it.items():
            if c <= count and (c not in best or candidate < best[c]):
                best[c] = candidate
    return list(best[count][1])


def check_layers(layers: Sequence[int], num_layers: int) -> list[int]:
    """Explicitly chosen layers in order.

    Raises:
        ValueError: If a layer is the first, the last or none of the model's, or if two are adjacent or the same.
    """
    _check_enough(num_layers)
    chosen = sorted(layers)
    if not chosen or chosen[0] < 1 or chosen[-1] > num_layers - 2:
        raise ValueError(
            f"layers_to_replace={list(layers)} must name layers from 1 to {num_layers - 2} of a model with "
            f"{num_layers} layers; the first and the last are kept."
        )
    for earlier, later in zip(chosen, chosen[1:], strict=False):
        if later - earlier < 2:
            raise ValueError(
                f"layers_to_replace={list(layers)}: layers {earlier} and {later} are not apart, but a surrogate needs "
                "both of its neighbours; leave one of them out, or name the run in spans."
            )
    return chosen


def runs_of(layers: Sequence[int]) -> list[Span]:
    """The spans that some layers, in order, make up."""
    spans: list[Span] = []
    for layer in layers:
        if spans and spans[-1][1] == layer:
            spans[-1] = (spans[-1][0], layer + 1)
        else:
            spans.append((layer, layer + 1))
    return spans


def check_spans(spans: Sequence[Sequence[int]], kinds: Sequence[str]) -> list[Span]:
    """Explicitly chosen spans in order.

    Args:
        spans: The spans.
        kinds: What each layer of the model is, such as its type of attention.

    Raises:
        ValueError: If a span has the first, the last or none of the model's layers, if two overlap or touch, or if one
            has layers of more than one kind.
    """
    _check_enough(len(kinds))
    chosen = sorted((first, end) for first, end in spans)
    for first, end in chosen:
        name = f"spans={[list(span) for span in spans]}"
        if first < 1 or end > len(kinds) - 1:
            raise ValueError(
                f"{name}: [{first}, {end}] must lie within [1, {len(kinds) - 1}] in a model with {len(kinds)} layers, "
                "whose first layer comes before every surrogate and whose last is kept."
            )
        change = _change_within((first, end), kinds)
        if change is not None:
            raise ValueError(
                f"{name}: [{first}, {end}] crosses a change of layer type, from {kinds[change - 1]} to "
                f"{kinds[change]} at layer {change}; end it there, or start there."
            )
    for earlier, later in zip(chosen, chosen[1:], strict=False):
        if later[0] < earlier[1]:
            raise ValueError(
                f"spans={list(spans)}: {list(earlier)} and {list(later)} overlap; make them one, or part."
            )
        if later[0] == earlier[1]:
            raise ValueError(
                f"spans={list(spans)}: {list(earlier)} and {list(later)} touch, but a surrogate needs a layer before "
                f"it; make them one, [{earlier[0]}, {later[1]}], or leave a layer between them."
            )
    return chosen


def _change_within(span: Span, kinds: Sequence[str]) -> int | None:
    return next((layer for layer in range(span[0] + 1, span[1]) if kinds[layer] != kinds[layer - 1]), None)


def candidate_spans(count: int, kinds: Sequence[str]) -> list[Span]:
    """All spans of `count` layers that may go.

    Args:
        count: Their length.
        kinds: What each layer of the model is.

    Raises:
        ValueError: If there is none.
    """
    _check_enough(len(kinds))
    spans = [(first, first + count) for first in range(1, len(kinds) - count)]
    fitting = [span for span in spans if count > 0 and _change_within(span, kinds) is None]
    if not fitting:
        longest = max(end - first for first, end in _runs_of_a_kind(kinds))
        raise ValueError(
            f"num_layers_to_replace={count} does not fit a model with {len(kinds)} layers as one span of one type of "
            f"layer between the first and the last; choose a number from 1 to {longest}."
        )
    return fitting


def _runs_of_a_kind(kinds: Sequence[str]) -> list[Span]:
    """The longest spans of layers of one kind, between the first layer and the last."""
    changes = [layer for layer in range(2, len(kinds) - 1) if kinds[layer] != kinds[layer - 1]]
    return list(zip([1, *changes], [*changes, len(kinds) - 1], strict=True))


def least_influence_spans(influence: Sequence[float], count: int, kinds: Sequence[str]) -> list[Span]:
    """The layers of least influence one by one, adjacent ones as one span.

    A layer is passed over where it would stand beside a chosen layer of another kind.

    Args:
        influence: One value for each layer of the model.
        count: How many to choose.
        kinds: What each layer of the model is.

    Raises:
        ValueError: If the model has too few layers.
    """
    _check_enough(len(influence))
    chosen: list[int] = []  # as many as fit
    for layer in sorted(range(1, len(influence) - 1), key=influence.__getitem__):
        beside = [other for other in (layer - 1, layer + 1) if other in chosen]
        if all(kinds[other] == kinds[layer] for other in beside):
            chosen.append(layer)
    if not 1 <= count <= len(chosen):
        by_data = (
            " How many fit depends on the order of their influence, so on the data." if len(set(kinds)) > 1 else ""
        )
        raise ValueError(
            f"num_layers_to_replace={count} does not fit a model with {len(influence)} layers, of which neither the "
            f"first, nor the last, nor neighbours of two types are replaced; choose a number from 1 to {len(chosen)}."
            f"{by_data}"
        )
    return runs_of(sorted(chosen[:count]))


def named_spans(config: RepLConfig, kinds: Sequence[str]) -> list[Span] | None:
    """The spans that a config says without data; `None` if it leaves them to the data.

    What a config asks for in vain is found here, before any data are run through a model.

    Args:
        config: Says which.
        kinds: What each layer of the model is.

    Raises:
        ValueError: If the layers are not fit to be replaced.
    """
    if config.spans is not None:
        return check_spans(config.spans, kinds)  # type: ignore[arg-type]  # text is read by the config
    if config.layers_to_replace is not None:
        return runs_of(check_layers(config.layers_to_replace, len(kinds)))
    if config.placement == "every":
        return runs_of(every_kth(len(kinds), config.every))
    return None
