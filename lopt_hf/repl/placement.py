"""Placement of surrogates: never in place of the first or the last layer, never of two neighbours."""

from collections.abc import Sequence

from lopt_hf.repl.config import RepLConfig

__all__ = ["check_layers", "every_kth", "least_influence"]


def every_kth(num_layers: int, every: int) -> list[int]:
    """Layers K, 2K, ... counted from 1 (paper), as numbers from 0; the last layer stays.

    Raises:
        ValueError: If there is no such layer.
    """
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
                "both of its neighbours; leave one of them out."
            )
    return chosen


def choose_layers(config: RepLConfig, num_layers: int, influence: Sequence[float] | None) -> list[int]:
    """The layers that a config asks for.

    Args:
        config: Says how.
        num_layers: Layers of the model.
        influence: Each layer's block influence, for the placement of that name.

    Raises:
        ValueError: If the layers are not fit to be replaced.
    """
    if config.layers_to_replace is not None:
        return check_layers(config.layers_to_replace, num_layers)
    if config.placement == "every":
        return every_kth(num_layers, config.every)
    assert influence is not None and config.num_layers_to_replace is not None
    return least_influence(influence, config.num_layers_to_replace)
