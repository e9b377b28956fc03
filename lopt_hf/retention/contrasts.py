"""Differences between methods: at the same learning rate, and at the same gain.

At the same rate one method may learn less than another and forget less for that reason alone. So methods are also
compared at matched gain: each point of the first method with the value that the second method's line, from the
baseline through its own rates in order of gain, has at that gain. The line is drawn for each seed apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lopt_hf.retention.deltas import ModelScores, entry_metrics, entry_scores, gain_scores, is_higher_better
from lopt_hf.retention.heldout import HELDOUT_TASK
from lopt_hf.retention.results import Contrast
from lopt_hf.retention.statistics import Scores, combine_intervals, paired_interval, seed_interval
from lopt_hf.retention.suites import TaskEntry

__all__ = ["MethodPoint", "matched_contrasts", "rate_contrasts"]


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


def rate_contrasts(
    first: Sequence[MethodPoint], second: Sequence[MethodPoint], entries: Sequence[TaskEntry], confidence: float
) -> Iterator[Contrast]:
    """The first method minus the second at each rate that both have: gain and each task's main metric."""
    for point in first:
        for other in second:
            if point.learning_rate == other.learning_rate:
                weights = [{seed: 1.0} for seed in range(len(point.seeds))]
                yield from _contrasts(point, other.label, other.seeds, weights, entries, confidence, with_gain=True)


def matched_contrasts(
    first: Sequence[MethodPoint],
    second: Sequence[MethodPoint],
    baseline: ModelScores,
    entries: Sequence[TaskEntry],
    confidence: float,
) -> Iterator[Contrast]:
    """The first method's points minus the second method's line at the same gain, where the line reaches that far."""
    if HELDOUT_TASK not in baseline:
        return
    for point in first:
        models = [baseline, *(scores for other in second for scores in other.seeds)]
        weights = []
        for seed, scores in enumerate(point.seeds):
            line = {0: 0.0}
            for number, other in enumerate(second):
                position = 1 + sum(len(earlier.seeds) for earlier in second[:number]) + seed
                line[position] = gain_scores(baseline).total - gain_scores(other.seeds[seed]).total
            found = _interpolation(line, gain_scores(baseline).total - gain_scores(scores).total)
            if found is not None:
                weights.append(found)
        if len(weights) == len(point.seeds):
            label = f"{_method(second)} at the same gain"
            yield from _contrasts(point, label, models, weights, entries, confidence, with_gain=False)


def _method(points: Sequence[MethodPoint]) -> str:
    """What the labels of one method's points have in common: they end with a comma and the rate."""
    return points[0].label.rpartition(", ")[0]


def _interpolation(line: Mapping[int, float], gain: float) -> dict[int, float] | None:
    """Weights of the two neighbours on a line of gains; `None` beyond its ends."""
    ordered = sorted(line, key=lambda position: line[position])
    for low, high in zip(ordered, ordered[1:], strict=False):
        if line[low] <= gain <= line[high] and line[high] > line[low]:
            share = (gain - line[low]) / (line[high] - line[low])
            return {low: 1 - share, high: share}
    return None


def _contrasts(
    point: MethodPoint,
    label: str,
    models: Sequence[ModelScores],
    weights: Sequence[Mapping[int, float]],
    entries: Sequence[TaskEntry],
    confidence: float,
    with_gain: bool,
) -> Iterator[Contrast]:
    """The point minus a weighted mean of models, whose weights differ from seed to seed."""
    if with_gain and HELDOUT_TASK in point.seeds[0]:
        parts = ([[gain_scores(scores)] for scores in point.seeds], [[gain_scores(scores)] for scores in models])
        yield _contrast(point, label, HELDOUT_TASK, "answer_loss", False, parts, [1.0], weights, confidence)
    for entry in entries:
        name = entry_metrics(entry, point.seeds[0])[0]
        firsts = [entry_scores(entry, name, scores) for scores in point.seeds]
        sizes = [float(len(part)) if entry.group_metrics.get(name, True) else 1.0 for part in firsts[0]]
        parts = (firsts, [entry_scores(entry, name, scores) for scores in models])
        higher = is_higher_better(entry, name, point.seeds[0])
        yield _contrast(
            point, label, entry.name, name.removesuffix(",none"), higher, parts, sizes, weights, confidence
        )


def _contrast(
    point: MethodPoint,
    label: str,
    task: str,
    metric: str,
    higher_is_better: bool,
    parts: tuple[list[list[Scores]], list[list[Scores]]],
    sizes: Sequence[float],
    weights: Sequence[Mapping[int, float]],
    confidence: float,
) -> Contrast:
    firsts, models = parts
    pooled = np.zeros(len(models))
    for of_seed in weights:
        for position, weight in of_seed.items():
            pooled[position] += weight / len(weights)
    used = np.flatnonzero(pooled)
    intervals = [
        paired_interval(
            [first[part] for first in firsts],
            [models[position][part] for position in used],
            confidence,
            before_weights=pooled[used].tolist(),
        )
        for part in range(len(sizes))
    ]
    over_samples = intervals[0] if len(intervals) == 1 else combine_intervals(intervals, sizes, confidence)
    by_seed = [
        _value(first, sizes) - sum(weight * _value(models[position], sizes) for position, weight in of_seed.items())
        for first, of_seed in zip(firsts, weights, strict=True)
    ]
    interval = seed_interval(over_samples, by_seed, confidence)
    return Contrast(
        first=point.label,
        second=label,
        task=task,
        metric=metric,
        higher_is_better=higher_is_better,
        difference=interval.delta,
        low=interval.low,
        high=interval.high,
        seeds=len(by_seed),
    )


def _value(parts: Sequence[Scores], sizes: Sequence[float]) -> float:
    return float(np.average([part.total for part in parts], weights=sizes))
