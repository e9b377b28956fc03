"""Paired statistics: differences between models on the same samples, with confidence intervals.

Every statement is a difference between models that answered the same samples, so what varies from sample to sample
cancels. Samples are resampled together for all models and seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lopt_hf.common.sample_scores import MeanScores, ResampledScores, Scores, tied

__all__ = [
    "Interval",
    "difference_interval",
    "mcnemar",
    "mean_interval",
    "paired_interval",
]

RESAMPLES = 4_000
SLOW_RESAMPLES = 500  # for metrics that have to be recomputed one resample at a time
# Above this many samples the bias-corrected interval, whose jackknife grows with the square, is no longer different
MAX_BCA_SAMPLES = 2_000
BATCH_ELEMENTS = 4_000_000
# Share of what the samples make of the variance between seeds that counts against it. At 0 three seeds that differ by
# nothing else would get a longer interval than one of them; at 1 the intervals of two or five cover only 92 % at worst
SEED_SHRINKAGE = 0.6
# Share of samples that tie exactly from which on so few others differ that a bootstrap of them is too short
MOSTLY_TIED = 0.5
FEW_CHANGES = 5  # of these all could go one way by chance, one time in sixteen


@dataclass(frozen=True)
class Interval:
    """A difference with its confidence interval, and the resamples needed to average it with others.

    Parameters:
        delta: The difference; of several seeds the mean.
        low: Lower end of the interval; `nan` where there is none.
        high: Upper end.
        by_seed: The difference of each seed, shape (seeds,).
        draws: The same over resamples of the samples, shape (seeds, resamples).
        num_samples: Samples in all, or clusters of them where clusters are resampled.
        is_share: Whether the metric is the share of samples that are right.
        bounds: What the difference can be at all, such as -1 to 1 between two accuracies; the interval ends there.
        confidence: Level of the interval.
        degrees_of_freedom: Of Student's distribution that the difference, over its standard error, is taken to have:
            Welch and Satterthwaite's for what varies between samples and between seeds.
        samples_freedom: The same for what varies between samples alone.
        largest_change: How far the pseudo-change in the interval moves the difference; 0 where there is none.
        has_few_changes: Whether most samples are the same for all models, and too few of a task differ for the
            interval to say how large a difference may be.
    """

    delta: float
    low: float
    high: float
    by_seed: NDArray[Any]
    draws: NDArray[Any]
    num_samples: int
    is_share: bool
    bounds: tuple[float, float] = (-np.inf, np.inf)
    confidence: float = 0.95
    degrees_of_freedom: float = np.inf
    samples_freedom: float = np.inf
    largest_change: float = 0.0
    has_few_changes: bool = False

    @property
    def p_value(self) -> float:
        """Two-sided p-value of no difference: below `1 - confidence` just where the interval leaves out zero.

        `nan` where there is no interval, or too few samples differ for one.
        """
        distance = self.delta - (self.low if self.delta > 0 else self.high)
        if np.isnan(distance) or (self.has_few_changes and self.low <= 0 <= self.high):
            return math.nan
        if self.delta == 0 or distance == 0:
            return float(self.delta == 0)
        return float(2 * stats.t.sf(self._quantile(self.confidence) * self.delta / distance, self.degrees_of_freedom))

    def at(self, confidence: float) -> tuple[float, float]:
        """Returns the ends of the interval at another level, by Student's quantiles at both levels."""
        factor = self._quantile(confidence) / self._quantile(self.confidence)
        low, high = (self.delta + factor * (end - self.delta) for end in (self.low, self.high))
        return max(low, self.bounds[0]), min(high, self.bounds[1])

    def detectable(self, power: float = 0.8) -> float:
        """Returns the smallest difference that samples like these would have shown.

        Args:
            power: Share of repetitions in which a difference of that size leaves zero out of the interval.

        Returns:
            The sum of the quantiles of level and power times the standard error, which is the half width over the
            former (Miller 2024, arXiv 2411.00640, Sec. 5, with Student's quantiles); `nan` where there is no interval,
            or too few samples differ for one.
        """
        if self.has_few_changes:
            return math.nan
        level = self._quantile(self.confidence)
        needed = level + float(stats.t.ppf(power, self.degrees_of_freedom))
        return (self.high - self.low) / 2 * needed / level

    def is_within(self, margin: float) -> bool:
        """Whether the difference is shown to be smaller than a margin in either direction.

        Two one-sided tests, each at `1 - confidence` (Schuirmann 1987): at 95 % the 90 % interval lies between them.
        Never where too few samples differ.

        Args:
            margin: In units of the difference, above 0.
        """
        if self.has_few_changes:
            return False
        low, high = self.at(max(0.0, 2 * self.confidence - 1))
        return bool(-margin < low and high < margin)

    def _quantile(self, confidence: float) -> float:
        return float(stats.t.ppf((1 + confidence) / 2, self.degrees_of_freedom))


@dataclass(frozen=True)
class _Task:
    """What one task adds to the variance of a difference over several.

    Parameters:
        variance: Over resamples, of the mean over seeds.
        freedom: Degrees of freedom that it is known with.
        pseudo_change: How far a pseudo-change of this task would move the difference; 0 if it gets none.
        has_few_changes: As in `Interval`.
    """

    variance: float
    freedom: float
    pseudo_change: float
    has_few_changes: bool


def difference_interval(
    models: Sequence[Sequence[Scores]],
    coefficients: Sequence[Sequence[float]] | NDArray[Any],
    weights: Sequence[float] = (1.0,),
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A difference between models that answered the same samples, with an interval over samples and training seeds.

    Samples are resampled, for all models together and for each task apart. The interval is that of the bootstrap:
    bias-corrected and accelerated (Efron 1987, by `scipy.stats.bootstrap`) for a single task, of percentiles for
    several and where there is a pseudo-change. Five things are added.

    - It is stretched by `sqrt(n / (n - 1))` and by what Student's quantile is wider than the normal one, since a
      bootstrap of few samples is too narrow (Hesterberg 2015). Of several tasks the degrees of freedom are Welch and
      Satterthwaite's: few where a small task makes most of the variance.
    - Clusters of samples get the interval of the normal distribution with the bootstrap's standard error, as in
      cluster-robust regression: with some tens of clusters, percentiles cover less.
    - Right and wrong answers get one pseudo-change of either kind, as in the interval of Bonett and Price (2012): few
      changes would make it too short, and none at all would leave it no width. Of several tasks it is an answer of
      the one whose answers count most. Clusters of answers get it where none of them changed. So do other means over
      samples where at least half of these are exactly the same for both models: the pseudo-change is as large as the
      scores of single samples are apart, over all models.
    - Of metrics without one, such as ratios of sums, most of whose samples are the same, fewer than `FEW_CHANGES` that
      differ say neither that there is a difference nor that there is none: the interval has zero in it.
    - With several seeds the half-width for the variance between them, by Student's quantile for so many seeds, takes
      the place of that for what the samples make of this variance, where it is the larger of the two.

    Args:
        models: For each model its scores by task; the tasks are the same for all.
        coefficients: Weight of each model in the difference of each seed, shape (seeds, models).
        weights: Weights of the tasks; they need not add up to one.
        confidence: Level of the interval.
        seed: Seed of the resampling.

    Returns:
        The mean over seeds; both ends `nan` if a task has a single sample, or some model's score is not finite.

    Raises:
        ValueError: If the numbers of samples differ between models.
    """
    of_seed = np.asarray(coefficients, dtype=np.float64)
    used = [int(number) for number in np.flatnonzero(of_seed.any(axis=0))]
    tasks = list(zip(*(models[number] for number in used), strict=True))
    of_seed = of_seed[:, used]
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    num_samples = sum(len(task[0]) for task in tasks)
    is_share = all(scores.is_share for task in tasks for scores in task)
    by_task = [_combined(of_seed, [scores.total for scores in task]) for task in tasks]
    by_seed: NDArray[Any] = np.tensordot(shares, by_task, axes=1)
    if not np.isfinite(by_seed).all():  # as of the perplexity of a diverged model
        nothing = np.full((len(of_seed), RESAMPLES), np.nan)
        delta = float(by_seed.mean())
        return Interval(delta, np.nan, np.nan, by_seed, nothing, num_samples, is_share, confidence=confidence)
    rng = np.random.default_rng(seed)
    deviations: NDArray[Any] = np.zeros((len(of_seed), 1))
    moved = []
    for share, task, difference in zip(shares, tasks, by_task, strict=True):
        of_task = share * _deviations(task, of_seed, difference, rng)
        moved.append(of_task.mean(axis=0))
        deviations = deviations + of_task
    of_tasks = _parts(tasks, shares, moved, of_seed)
    draws = by_seed[:, None] + deviations
    means = draws.mean(axis=0)
    ends = None
    has_pseudo_change = any(task.pseudo_change for task in of_tasks)
    if any(map(_is_clustered, tasks)) and not has_pseudo_change:
        half = stats.norm.ppf((1 + confidence) / 2) * means.std()
        ends = float(by_seed.mean() - half), float(by_seed.mean() + half)
    elif len(tasks) == 1 and not (is_share or has_pseudo_change) and 2 <= num_samples <= MAX_BCA_SAMPLES:
        ends = _accelerated_ends(tasks[0], of_seed.mean(axis=0), means, confidence)
    bounds = (-np.inf, np.inf)
    if is_share:
        bounds = float(of_seed.clip(max=0).sum(axis=1).mean()), float(of_seed.clip(min=0).sum(axis=1).mean())
    return _interval(by_seed, draws, of_tasks, num_samples, is_share, confidence, rng, bounds, ends)


def paired_interval(after: Scores, before: Scores, confidence: float = 0.95, seed: int = 0) -> Interval:
    """`difference_interval` of one model and its baseline on one task."""
    return difference_interval([[after], [before]], [[1.0, -1.0]], confidence=confidence, seed=seed)


def mean_interval(intervals: Sequence[Interval], confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean of differences on independent samples, such as those of several tasks, for the same seeds.

    Args:
        intervals: What `difference_interval` gave for each.
        confidence: Level of the interval.
        seed: Seed of the order in which the resamples are put together.
    """
    rng = np.random.default_rng(seed)
    size = min(interval.draws.shape[1] for interval in intervals)
    draws = np.mean([rng.permutation(interval.draws, axis=1)[:, :size] for interval in intervals], axis=0)
    by_seed = np.mean([interval.by_seed for interval in intervals], axis=0)
    num_samples = sum(interval.num_samples for interval in intervals)
    is_share = all(interval.is_share for interval in intervals)
    low, high = np.mean([interval.bounds for interval in intervals], axis=0)
    bounds = float(low), float(high)
    number = len(intervals)
    of_tasks = [
        _Task(
            float(interval.draws.mean(axis=0).var()) / number**2,
            interval.samples_freedom,
            interval.largest_change / number,
            interval.has_few_changes,
        )
        for interval in intervals
    ]
    return _interval(by_seed, draws, of_tasks, num_samples, is_share, confidence, rng, bounds)


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


def _combined(of_seed: NDArray[Any], totals: Sequence[float]) -> NDArray[Any]:
    """Returns each seed's difference; models of weight 0 do not count, even with an infinite score."""
    return np.multiply(of_seed, totals, where=of_seed != 0, out=np.zeros_like(of_seed)).sum(axis=1)


def _is_clustered(task: Sequence[Scores]) -> bool:
    return any(len(scores) < scores.num_samples for scores in task)


def _parts(
    tasks: Sequence[Sequence[Scores]], shares: NDArray[Any], moved: Sequence[NDArray[Any]], of_seed: NDArray[Any]
) -> list[_Task]:
    """Returns what each task adds, given how far its resamples move the difference, shape (resamples,) each."""
    found = [_largest_change(task, of_seed) for task in tasks]
    changes = [
        float(share) * change / len(task[0]) for share, task, (change, _) in zip(shares, tasks, found, strict=True)
    ]
    clustered = [_is_clustered(task) for task in tasks]
    has_changed = [np.ptp(part) > 1e-9 * change > 0 for part, change in zip(moved, changes, strict=True)]
    has_few = [
        few and (change == 0 or (part and changed))
        for (_, few), change, part, changed in zip(found, changes, clustered, has_changed, strict=True)
    ]
    # A cluster that changes as a whole would say too much of clusters that change in part
    if any(part and has_changed[number] for number, part in enumerate(clustered)):
        changes = [0.0 if part else change for part, change in zip(clustered, changes, strict=True)]
    return [
        _Task(float(part.var()), len(task[0]) - 1, change, bool(few))
        for task, part, change, few in zip(tasks, moved, changes, has_few, strict=True)
    ]


def _largest_change(task: Sequence[Scores], of_seed: NDArray[Any]) -> tuple[float, bool]:
    """Returns how much the score of a sample may change unseen, and whether hardly any sample is seen to change.

    The former is 1 for right and wrong answers; of other means the range of scores where most samples tie, else 0.
    """
    if all(scores.is_share for scores in task):
        return 1.0, False
    ties = _ties(task, of_seed)
    if ties.mean() < MOSTLY_TIED:
        return 0.0, False
    extremes = [scores.extremes for scores in task]
    ends = [ends for ends in extremes if ends is not None]
    change = max(high for _, high in ends) - min(low for low, _ in ends) if len(ends) == len(task) else 0.0
    return change, int((~ties.all(axis=0)).sum()) < FEW_CHANGES


def _ties(task: Sequence[Scores], of_seed: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns on which samples each seed's models are exactly the same, shape (seeds, samples)."""
    rows = []
    for coefficients in of_seed:
        models = [scores for scores, weight in zip(task, coefficients, strict=True) if weight]
        is_difference = abs(float(coefficients.sum())) < 1e-9  # and not one model's own score
        same = np.full(len(task[0]), is_difference)
        for other in models[1:] if is_difference else ():
            same &= tied(models[0], other)
        rows.append(same)
    return np.stack(rows)


def _samples_freedom(tasks: Sequence[_Task], of_pseudo_change: float) -> float:
    """Returns the degrees of freedom of the variance between samples of several tasks.

    Args:
        tasks: The tasks.
        of_pseudo_change: Variance of the pseudo-change, which belongs to the task that it moves most.
    """
    variances = [task.variance for task in tasks]
    variances[int(np.argmax([task.pseudo_change for task in tasks]))] += of_pseudo_change
    return _welch_satterthwaite(variances, [task.freedom for task in tasks])


def _welch_satterthwaite(variances: Sequence[float], freedoms: Sequence[float]) -> float:
    """Returns the degrees of freedom of a sum of estimated variances; infinity if all of them are 0."""
    parts = sum(variance**2 / freedom for variance, freedom in zip(variances, freedoms, strict=True) if variance)
    return float(sum(variances) ** 2 / parts) if parts else float("inf")


def _deviations(
    task: Sequence[Scores], of_seed: NDArray[Any], by_task: NDArray[Any], rng: np.random.Generator
) -> NDArray[Any]:
    """Returns how far each resample moves each seed's difference on one task, shape (seeds, resamples)."""
    sizes = {len(scores) for scores in task}
    if len(sizes) != 1:
        raise ValueError(f"paired scores have {sorted(sizes)} samples; they must be those of the same samples.")
    number = sizes.pop()
    is_slow = any(isinstance(scores, ResampledScores) for scores in task)
    resamples = SLOW_RESAMPLES if is_slow else RESAMPLES
    if number < 2:
        return np.full((len(of_seed), RESAMPLES), np.nan)
    batches = []
    for start in range(0, resamples, max(1, BATCH_ELEMENTS // number)):
        size = min(resamples - start, max(1, BATCH_ELEMENTS // number))
        index = rng.integers(number, size=(size, number))
        batches.append(of_seed @ np.stack([scores.value(index) for scores in task]))
    stretched: NDArray[Any] = (np.concatenate(batches, axis=1) - by_task[:, None]) * _small_sample_factor(number)
    if is_slow:  # to the length of the others
        stretched = rng.choice(stretched, RESAMPLES, axis=1)
    return stretched


def _accelerated_ends(
    task: Sequence[Scores], coefficients: NDArray[Any], draws: NDArray[Any], confidence: float
) -> tuple[float, float] | None:
    """Returns the ends of the bias-corrected and accelerated interval; `None` where it is not defined."""
    number = len(task[0])
    delta = float(coefficients @ [scores.total for scores in task])
    if np.ptp(draws) <= 1e-9 * np.abs(draws).max() or any(isinstance(scores, ResampledScores) for scores in task):
        return None

    def difference(index: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        rows = np.moveaxis(index, axis, -1)
        return np.tensordot(coefficients, [scores.value(rows) for scores in task], axes=1)

    factor = _small_sample_factor(number)
    interval = stats.bootstrap(
        (np.arange(number),),
        difference,
        n_resamples=0,
        batch=max(1, BATCH_ELEMENTS // number),
        vectorized=True,
        confidence_level=confidence,
        method="BCa",
        bootstrap_result=SimpleNamespace(bootstrap_distribution=delta + (draws - delta) / factor),
    ).confidence_interval
    low, high = (float(delta + factor * (end - delta)) for end in interval)
    return (low, high) if np.isfinite([low, high]).all() else None


def _interval(
    by_seed: NDArray[Any],
    draws: NDArray[Any],
    tasks: Sequence[_Task],
    num_samples: int,
    is_share: bool,
    confidence: float,
    rng: np.random.Generator,
    bounds: tuple[float, float],
    ends: tuple[float, float] | None = None,
) -> Interval:
    """Corrects the bootstrap over samples for few changes, the variance between seeds, and small samples."""
    delta, num_seeds = float(by_seed.mean()), len(by_seed)
    means = draws.mean(axis=0)
    # Of changes that as often leave every answer as it was, those in the one task that it moves most are the largest
    largest = max(task.pseudo_change for task in tasks)
    if largest > 0:
        either = rng.poisson(1, (2, len(means)))
        means = means + (either[0] - either[1]) * largest / np.sqrt(num_seeds)
    level = (1 + confidence) / 2
    low, high = ends or np.quantile(means, (1 - level, level))
    of_samples, (of_seeds, explained) = float(np.var(means)), _variances_of_seeds(by_seed, draws)
    freedom = samples_freedom = np.inf
    if of_samples + of_seeds > 0:
        samples_freedom = _samples_freedom(tasks, 2 * largest**2 / num_seeds)
        by_samples = float(stats.t.ppf(level, samples_freedom)) ** 2
        of_seeds_squared = _squared_width_of_seeds(level, of_seeds, explained, num_seeds)
        total = np.sqrt(by_samples * of_samples + max(0.0, of_seeds_squared - by_samples * explained))
        alone = stats.norm.ppf(level) * np.sqrt(of_samples)
        if alone > 1e-3 * total:
            low, high = (delta + total / alone * (end - delta) for end in (low, high))
        else:
            low, high = delta - total, delta + total
        apart = max(0.0, of_seeds - explained)
        freedom = _welch_satterthwaite([of_samples, apart], [samples_freedom, num_seeds - 1])
    low, high = np.clip((low, high), *bounds)
    if all(task.has_few_changes for task in tasks):
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(
        *(delta, float(low), float(high), by_seed, draws, num_samples, is_share, bounds, confidence),
        degrees_of_freedom=freedom,
        samples_freedom=samples_freedom,
        largest_change=largest,
        has_few_changes=any(task.has_few_changes for task in tasks),
    )


def _variances_of_seeds(by_seed: NDArray[Any], draws: NDArray[Any]) -> tuple[float, float]:
    """Returns the variance of the mean over seeds, by what varies between them, and the part that samples explain."""
    num_seeds = len(by_seed)
    if num_seeds < 2:
        return 0.0, 0.0
    apart = draws - draws.mean(axis=0) - (by_seed - by_seed.mean())[:, None]
    explained = np.square(apart).mean(axis=1).sum() / (num_seeds - 1)
    return float(np.var(by_seed, ddof=1)) / num_seeds, float(explained) / num_seeds


def _squared_width_of_seeds(level: float, of_seeds: float, explained: float, num_seeds: int) -> float:
    """Returns the square of the half-width for the variance between seeds.

    It is Student's, made shorter where the samples explain much of that variance. What they explain is not subtracted:
    two or three seeds often vary so little by chance that nothing would be left, and intervals of seeds that do differ
    would cover 86 to 91 %.

    Args:
        level: Of Student's quantile.
        of_seeds: Variance of the mean over seeds, by what varies between them.
        explained: What the samples make of it.
        num_seeds: Number of seeds.
    """
    if of_seeds == 0:
        return 0.0
    quantile = float(stats.t.ppf(level, num_seeds - 1))
    return quantile**2 * of_seeds**2 / (of_seeds + SEED_SHRINKAGE * explained)


def _small_sample_factor(number: int) -> float:
    return float(np.sqrt(number / (number - 1)))
