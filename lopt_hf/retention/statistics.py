"""Paired statistics: what changed on the same samples, and how sure that is.

Every statement is a difference between models that answered the same samples, so what varies from sample to sample
cancels. Samples are resampled together for all models and seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "Interval",
    "MeanScores",
    "RatioScores",
    "ResampledScores",
    "Scores",
    "combine_intervals",
    "mcnemar",
    "paired_interval",
    "seed_interval",
]

RESAMPLES = 4_000
SLOW_RESAMPLES = 500  # for metrics that have to be recomputed one resample at a time
# Above this many samples the bias-corrected interval, whose jackknife grows with the square, is no longer different
MAX_BCA_SAMPLES = 2_000
BATCH_ELEMENTS = 4_000_000


class Scores:
    """What one model scored on each sample, and how the metric follows from them."""

    def __len__(self) -> int:
        raise AssertionError("subclasses have a length")

    def value(self, index: NDArray[Any]) -> NDArray[Any]:
        """The metric over chosen samples.

        Args:
            index: Sample numbers, shape (..., samples).

        Returns:
            Shape (...).
        """
        raise AssertionError("subclasses compute it")

    @cached_property
    def total(self) -> float:
        """The metric over all samples."""
        return float(self.value(np.arange(len(self))))


class MeanScores(Scores):
    """A metric that is the mean of one number per sample, such as accuracy."""

    def __init__(self, values: Sequence[float] | NDArray[Any]) -> None:
        self.values = np.asarray(values, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.values)

    def value(self, index: NDArray[Any]) -> NDArray[Any]:
        return self.values[index].mean(-1)

    @property
    def is_binary(self) -> bool:
        """Whether each sample is right or wrong."""
        return bool(np.isin(self.values, (0.0, 1.0)).all())


class RatioScores(Scores):
    """A metric that follows from a sum over samples by another sum, such as perplexity per word.

    Args:
        pairs: Numerator and denominator of each sample, such as log-likelihood and number of words.
        transform: From the ratio to the metric; works on arrays.
    """

    def __init__(self, pairs: Sequence[Sequence[float]], transform: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        self.numerator, self.denominator = np.asarray(pairs, dtype=np.float64).reshape(-1, 2).T
        self._transform = transform

    def __len__(self) -> int:
        return len(self.numerator)

    def value(self, index: NDArray[Any]) -> NDArray[Any]:
        return self._transform(self.numerator[index].sum(-1) / self.denominator[index].sum(-1))


class ResampledScores(Scores):
    """Any other metric: recomputed from the chosen samples by its own aggregation."""

    def __init__(self, items: Sequence[Any], aggregate: Callable[[list[Any]], float]) -> None:
        self._items = items
        self._aggregate = aggregate

    def __len__(self) -> int:
        return len(self._items)

    def value(self, index: NDArray[Any]) -> NDArray[Any]:
        rows = index.reshape(-1, index.shape[-1])
        values = [self._aggregate([self._items[i] for i in row]) for row in rows]
        return np.array(values, dtype=np.float64).reshape(index.shape[:-1])


@dataclass(frozen=True)
class Interval:
    """A difference, its confidence interval, and the bootstrap distribution behind it."""

    delta: float
    low: float
    high: float
    distribution: NDArray[Any]


def paired_interval(
    after: Sequence[Scores],
    before: Sequence[Scores],
    confidence: float = 0.95,
    seed: int = 0,
    before_weights: Sequence[float] | None = None,
) -> Interval:
    """The difference of a metric between models on the same samples, by the bootstrap over samples.

    The interval is bias-corrected and accelerated (Efron 1987), as `scipy.stats.bootstrap` computes it, and stretched
    by what Student's quantile is wider than the normal one, since a bootstrap of few samples is too narrow (Hesterberg
    2015). Of metrics that are right or wrong per sample it is the percentile interval with one pseudo-sample of either
    kind of change, the adjustment of Bonett and Price (2012): without it, few changes make an interval that is too
    short, and none at all an interval of no width.

    Args:
        after: Scores of the model; of several, such as seeds, the mean of their metrics counts.
        before: Scores of the baseline, likewise.
        confidence: Level of the interval.
        seed: Seed of the resampling.
        before_weights: Weights of `before`, in place of equal ones.

    Returns:
        `mean(after) - mean(before)` with its interval; both ends `nan` for a single sample.

    Raises:
        ValueError: If the numbers of samples differ.
    """
    sizes = {len(scores) for scores in (*after, *before)}
    if len(sizes) != 1:
        raise ValueError(f"paired scores have {sorted(sizes)} samples; they must be those of the same samples.")
    weights = np.full(len(before), 1 / len(before)) if before_weights is None else np.asarray(before_weights)
    everything = np.arange(min(sizes))
    delta = float(_mean_value(after, everything) - _weighted_value(before, weights, everything))
    number = sizes.pop()
    if number < 2:
        return Interval(delta, float("nan"), float("nan"), np.full(RESAMPLES, delta))
    is_binary = all(isinstance(scores, MeanScores) and scores.is_binary for scores in (*after, *before))
    if is_binary:
        after, before = _with_pseudo_changes(after, 0.0, 1.0), _with_pseudo_changes(before, 1.0, 0.0)
        number += 2

    def difference(index: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        rows = np.moveaxis(index, axis, -1)
        return _mean_value(after, rows) - _weighted_value(before, weights, rows)

    is_slow = any(isinstance(scores, ResampledScores) for scores in (*after, *before))
    everything = np.arange(number)
    result = stats.bootstrap(
        (everything,),
        difference,
        n_resamples=SLOW_RESAMPLES if is_slow else RESAMPLES,
        batch=max(1, BATCH_ELEMENTS // number),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    if not (is_binary or is_slow or number > MAX_BCA_SAMPLES) and _varies(result.bootstrap_distribution):
        interval = stats.bootstrap(
            (everything,),
            difference,
            n_resamples=0,
            batch=max(1, BATCH_ELEMENTS // number),
            vectorized=True,
            confidence_level=confidence,
            method="BCa",
            bootstrap_result=result,
        ).confidence_interval
    stretch = 1.0 if is_binary else _stretch(number, confidence)
    low, high = (delta + stretch * (end - delta) for end in (interval.low, interval.high))
    return Interval(delta, float(low), float(high), result.bootstrap_distribution)


def combine_intervals(
    intervals: Sequence[Interval], weights: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The weighted mean of differences on independent samples, such as those of several tasks.

    Args:
        intervals: What `paired_interval` gave for each.
        weights: Their weights; they need not add up to one.
        confidence: Level of the interval.
        seed: Seed of the order in which the resamples are put together.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    rng = np.random.default_rng(seed)
    size = max(len(interval.distribution) for interval in intervals)
    draws = np.stack([rng.choice(interval.distribution, size, replace=True) for interval in intervals])
    distribution = shares @ draws
    delta = float(shares @ [interval.delta for interval in intervals])
    tail = (1 - confidence) / 2
    low, high = np.quantile(distribution, (tail, 1 - tail))
    return Interval(delta, float(low), float(high), distribution)


def seed_interval(over_samples: Interval, by_seed: Sequence[float], confidence: float = 0.95) -> Interval:
    """Widens an interval over samples by what varies between training seeds.

    The half-width is the root of the sum of squares of two: that of the bootstrap over samples, and Student's for the
    mean over the seeds. The two are independent: the first asks for other questions, the second for other training
    data, order and initial values.

    Args:
        over_samples: The difference averaged over seeds, from `paired_interval`.
        by_seed: The difference of each seed.
        confidence: Level of both intervals.
    """
    if len(by_seed) < 2:
        return over_samples
    quantile = stats.t.ppf((1 + confidence) / 2, len(by_seed) - 1)
    of_seeds = quantile * np.std(by_seed, ddof=1) / np.sqrt(len(by_seed))
    below = np.hypot(over_samples.delta - over_samples.low, of_seeds)
    above = np.hypot(over_samples.high - over_samples.delta, of_seeds)
    delta = over_samples.delta
    return Interval(delta, float(delta - below), float(delta + above), over_samples.distribution)


def mcnemar(before: MeanScores, after: MeanScores) -> tuple[float, int, int]:
    """McNemar's exact test for answers that are right or wrong.

    Args:
        before: The baseline's answers, 1 for right.
        after: The model's.

    Returns:
        The two-sided p-value, the number of answers that went from right to wrong, and of those the other way.
    """
    right_to_wrong = int(((before.values == 1) & (after.values == 0)).sum())
    wrong_to_right = int(((before.values == 0) & (after.values == 1)).sum())
    changes = right_to_wrong + wrong_to_right
    p_value = stats.binomtest(wrong_to_right, changes).pvalue if changes else 1.0
    return float(p_value), right_to_wrong, wrong_to_right


def _with_pseudo_changes(several: Sequence[Scores], first: float, second: float) -> list[Scores]:
    return [MeanScores([*scores.values, first, second]) for scores in several if isinstance(scores, MeanScores)]


def _varies(values: NDArray[Any]) -> bool:
    """Whether values differ by more than rounding; BCa has no answer for those that don't."""
    return bool(np.ptp(values) > 1e-9 * np.abs(values).max())


def _stretch(number: int, confidence: float) -> float:
    level = (1 + confidence) / 2
    student, normal = stats.t.ppf(level, number - 1), stats.norm.ppf(level)
    return float(student / normal * np.sqrt(number / (number - 1)))


def _mean_value(several: Sequence[Scores], index: NDArray[Any]) -> NDArray[Any]:
    return np.mean([scores.value(index) for scores in several], axis=0)


def _weighted_value(several: Sequence[Scores], weights: NDArray[Any], index: NDArray[Any]) -> NDArray[Any]:
    return np.tensordot(weights / weights.sum(), [scores.value(index) for scores in several], axes=1)
