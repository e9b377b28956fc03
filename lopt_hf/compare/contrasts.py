"""Differences between methods: at the same learning rate, and at the same gain.

At the same rate one method may learn less than another and forget less for that reason alone. So methods are also
compared at matched gain: each point of the first method with the value that the second method's line has at that gain.
The line goes straight from the baseline through the second method's rates, from low to high, as far as they gain
more; it is drawn for each seed apart. If forgetting grows faster than gain, a straight line lies below the true curve
between two points, and favours the first method. The gains, measured on held-out answers, are taken as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lopt_hf.common.sample_scores import Scores
from lopt_hf.common.statistics import difference_interval
from lopt_hf.retention.deltas import (
    ModelScores,
    entry_metrics,
    entry_scores,
    gain_scores,
    is_higher_better,
    margin_of,
    task_weights,
)
from lopt_hf.retention.heldout import HELDOUT_TASK
from lopt_hf.retention.results import Contrast
from lopt_hf.retention.scores import on_common_samples
from lopt_hf.retention.suites import TaskEntry

__all__ = ["Margin", "MethodPoint", "matched_contrasts", "rate_contrasts"]


@dataclass(frozen=True)
class MethodPoint:
    """One method at one learning rate.

    Parameters:
        label: Name in the report.
        learning_rate: Peak rate.
        seeds: Scores of each seed's model, in the order of the seeds.
    """

    label: str
    learning_rate: float
    seeds: Sequence[ModelScores]


@dataclass(frozen=True)
class Margin:
    """The difference below which two methods are taken to be equal.

    Parameters:
        points: As in `deltas.margin_of`.
        baseline: Scores of the baseline, whose values it is relative to.
    """

    points: float
    baseline: ModelScores


def rate_contrasts(
    first: Sequence[MethodPoint],
    second: Sequence[MethodPoint],
    entries: Sequence[TaskEntry],
    confidence: float,
    margin: Margin,
) -> Iterator[Contrast]:
    """The first method minus the second at each rate that both have: gain and each task's main metric."""
    for point in first:
        for other in second:
            if point.learning_rate == other.learning_rate:
                weights = [{seed: 1.0} for seed in range(len(point.seeds))]
                yield from _contrasts(
                    point, other.label, other.seeds, weights, entries, confidence, margin, with_gain=True
                )


def matched_contrasts(
    first: Sequence[MethodPoint],
    second: Sequence[MethodPoint],
    baseline: ModelScores,
    entries: Sequence[TaskEntry],
    confidence: float,
    margin: Margin,
) -> Iterator[Contrast]:
    """The first method's points minus the second method's line at the same gain; none beyond the line's ends."""
    if HELDOUT_TASK not in baseline:
        return
    models = [baseline, *(scores for other in second for scores in other.seeds)]
    gains = [_gain(baseline, scores) for scores in models]
    for point in first:
        weights = []
        for seed, scores in enumerate(point.seeds):
            line = _rising([0, *_positions(second, seed)], gains)
            weights.append(_interpolation(line, gains, _gain(baseline, scores)))
        yield from _contrasts(
            point, f"{_method(second)} at the same gain", models, weights, entries, confidence, margin
        )


def _gain(baseline: ModelScores, scores: ModelScores) -> float:
    return gain_scores(baseline).total - gain_scores(scores).total


def _positions(points: Sequence[MethodPoint], seed: int) -> list[int]:
    """Where a seed's models are in the list that has the baseline first and then all seeds of each point."""
    starts = np.cumsum([1, *(len(point.seeds) for point in points)])
    order = sorted(range(len(points)), key=lambda number: points[number].learning_rate)
    return [int(starts[number]) + seed for number in order]


def _rising(positions: Sequence[int], gains: Sequence[float]) -> list[int]:
    """The beginning of a line, up to where its gain no longer rises."""
    line = [positions[0]]
    for position in positions[1:]:
        if gains[position] <= gains[line[-1]]:
            break
        line.append(position)
    return line


def _method(points: Sequence[MethodPoint]) -> str:
    """What the labels of one method's points have in common: they end with a comma and the rate."""
    return points[0].label.rpartition(", ")[0]


def _interpolation(line: Sequence[int], gains: Sequence[float], gain: float) -> dict[int, float] | None:
    """Weights of the two neighbours on a line; `None` beyond its ends."""
    for low, high in zip(line, line[1:], strict=False):
        if gains[low] <= gain <= gains[high]:
            share = (gain - gains[low]) / (gains[high] - gains[low])
            return {low: 1 - share, high: share}
    return None


def _contrasts(
    point: MethodPoint,
    label: str,
    models: Sequence[ModelScores],
    weights: Sequence[Mapping[int, float] | None],
    entries: Sequence[TaskEntry],
    confidence: float,
    margin: Margin,
    with_gain: bool = False,
) -> Iterator[Contrast]:
    """The point minus a weighted mean of models, whose weights differ from seed to seed.

    Without weights for some seed there is no difference to tell, and the contrast says so.
    """
    known = [of_seed for of_seed in weights if of_seed is not None]
    num_seeds = len(point.seeds)
    coefficients = np.hstack([np.eye(num_seeds), np.zeros((num_seeds, len(models)))])
    for seed, of_seed in enumerate(known):
        for position, weight in of_seed.items():
            coefficients[seed, num_seeds + position] -= weight

    everyone = on_common_samples([*point.seeds, *models])

    def contrast(
        task: str,
        metric: str,
        higher: bool | None,
        parts_of: Callable[[ModelScores], list[Scores]],
        weights_of: Callable[[list[Scores]], list[float]],
    ) -> Contrast:
        baseline = parts_of(margin.baseline)
        sizes = weights_of(baseline)
        equal = margin_of(margin.points, higher, float(np.average([part.total for part in baseline], weights=sizes)))
        if len(known) < num_seeds:
            nothing = (float("nan"),) * 3
            return Contrast(point.label, label, task, metric, higher, *nothing, num_seeds, equal, is_beyond=True)
        interval = difference_interval([parts_of(scores) for scores in everyone], coefficients, sizes, confidence)
        values = (interval.delta, interval.low, interval.high)
        return Contrast(
            *(point.label, label, task, metric, higher, *values, num_seeds, equal),
            p_value=interval.p_value,
            detectable=interval.detectable(),
            is_within_margin=interval.is_within(equal),
        )

    if with_gain and HELDOUT_TASK in everyone[0]:
        yield contrast(HELDOUT_TASK, "answer_loss", False, lambda scores: [gain_scores(scores)], lambda _: [1.0])
    for entry in entries:
        name = entry_metrics(entry, everyone[0])[0]
        higher = is_higher_better(entry, name, everyone[0])
        read = partial(entry_scores, entry, name), partial(task_weights, entry, name)
        yield contrast(entry.name, name.removesuffix(",none"), higher, *read)
