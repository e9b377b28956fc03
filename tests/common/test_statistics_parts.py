"""Intervals of what has several parts, tasks that know much and little, or seeds that differ, cover what is true."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from lopt_hf.common import statistics
from lopt_hf.common.sample_scores import MeanScores, ResampledScores, Scores, clustered
from lopt_hf.common.statistics import Interval, difference_interval, mean_interval, paired_interval

TRIALS = 1_000
Pair = tuple[Scores, Scores]


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    monkeypatch.setattr(statistics, "MAX_BCA_SAMPLES", 0)  # not needed for several tasks, nor for normal noise


def losses(rng: np.random.Generator, number: int) -> Pair:
    """Losses that change by nothing on the average."""
    before = rng.normal(size=number)
    return MeanScores(before + rng.normal(size=number)), MeanScores(before)


def answers(rng: np.random.Generator, lost: float, number: int, clusters: int | None = None) -> Pair:
    """Answers that are always right at first; in clusters some lose many and others few of them."""
    labels = None if clusters is None else (np.arange(number) % clusters).tolist()
    share = lost if clusters is None else rng.beta(4 * lost, 4 * (1 - lost), clusters)[labels]
    before, after = MeanScores(np.ones(number)), MeanScores(rng.random(number) >= share)
    return clustered(after, labels), clustered(before, labels)


def flips(rng: np.random.Generator, clusters: int | None) -> Pair:
    """1,000 answers of which 3 % flip, whichever cluster they are in."""
    before = rng.random(1_000) < 0.6
    labels = None if clusters is None else (np.arange(1_000) % clusters).tolist()
    after = before ^ (rng.random(1_000) < 0.03)
    return clustered(MeanScores(after), labels), clustered(MeanScores(before), labels)


def of_group(pairs: Sequence[Pair], seed: int = 0) -> Interval:
    """The interval of a group whose tasks count the same."""
    after, before = zip(*pairs, strict=True)
    return difference_interval([after, before], [[1.0, -1.0]], [1.0] * len(pairs), seed=seed)


def of_mean(pairs: Sequence[Pair], seed: int = 0) -> Interval:
    """The interval of the mean over tasks that have intervals of their own."""
    return mean_interval([paired_interval(*pair, seed=seed) for pair in pairs], seed=seed)


BOTH = pytest.mark.parametrize("interval_of", [of_group, of_mean], ids=["group", "mean"])


@BOTH
def test_clusters_beside_other_tasks_are_as_well_known_as_alone(
    interval_of: Callable[..., Interval], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the root of the sum of the squared widths, not the width of a whole cluster that changes."""
    monkeypatch.setattr(statistics, "RESAMPLES", 4_000)
    rng = np.random.default_rng(0)
    pairs = [flips(rng, 10), flips(rng, None), flips(rng, None)]
    widths = [alone.high - alone.low for alone in (paired_interval(*pair) for pair in pairs)]
    together = interval_of(pairs)
    assert together.high - together.low == pytest.approx(np.sqrt(np.square(widths).sum()) / 3, rel=0.15)


@BOTH
def test_clusters_beside_other_tasks_cover_the_truth(interval_of: Callable[..., Interval]) -> None:
    """Not far more often than claimed either."""
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(TRIALS // 2):
        pairs = [answers(rng, 0.2, 120, 20), answers(rng, 0.1, 80)]
        interval = interval_of(pairs, seed=trial)
        covered += interval.low <= -0.3 / 2 <= interval.high
    assert 0.93 <= covered / (TRIALS // 2) <= 0.975


@BOTH
def test_clusters_without_a_change_are_no_certainty_of_a_mean(interval_of: Callable[..., Interval]) -> None:
    """15 passages count as much as 1,000 answers: what they can't exclude, the mean of both can't."""
    labels = [number // 4 for number in range(60)]
    same = clustered(MeanScores([1.0, 0.0, 1.0, 1.0] * 15), labels)
    alone, together = paired_interval(same, same), interval_of([(same, same), flips(np.random.default_rng(2), None)])
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(0.5, abs=0.1)


def test_clusters_that_change_in_part_speak_for_those_of_other_tasks() -> None:
    """One task of a group is without a change: where the others' clusters change in part, its own don't as a whole."""
    rng = np.random.default_rng(8)
    pairs = [flips(rng, 20) for _ in range(11)]
    same = clustered(MeanScores(np.ones(100)), [number % 5 for number in range(100)])
    group = of_group([*pairs, (same, same)])
    assert group.high - group.low < 0.02


@BOTH
def test_a_small_task_beside_large_ones_covers_the_truth(interval_of: Callable[..., Interval]) -> None:
    """Six samples make most of what varies: it is known with hardly more than five degrees of freedom."""
    rng = np.random.default_rng(3)
    covered, freedoms = 0, []
    for trial in range(TRIALS):
        interval = interval_of([losses(rng, 6), losses(rng, 80)], seed=trial)
        covered += interval.low <= 0 <= interval.high
        freedoms.append(interval.degrees_of_freedom)
    assert 0.93 <= covered / TRIALS <= 0.97
    assert 5 <= np.median(freedoms) < 8


@BOTH
def test_few_clusters_beside_large_tasks_have_few_degrees_of_freedom(interval_of: Callable[..., Interval]) -> None:
    rng = np.random.default_rng(4)
    labels = [number % 5 for number in range(100)]
    shift = rng.normal(size=5)[labels]
    before = rng.normal(size=100)
    few = tuple(clustered(MeanScores(values), labels) for values in (before + shift, before))
    assert interval_of([few, losses(rng, 300)]).degrees_of_freedom == pytest.approx(4, abs=0.5)  # type: ignore[list-item]


@BOTH
def test_degrees_of_freedom_over_tasks_are_scipys(
    interval_of: Callable[..., Interval], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of Welch's test: what varies in a difference of two means varies as much in their mean."""
    monkeypatch.setattr(statistics, "RESAMPLES", 20_000)
    rng = np.random.default_rng(5)
    pairs = [losses(rng, 12), losses(rng, 40)]
    changes = [after.values - before.values for after, before in pairs]  # type: ignore[attr-defined]
    expected = stats.ttest_ind(*changes, equal_var=False).df
    assert interval_of(pairs).degrees_of_freedom == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("num_seeds", "lowest", "highest"), [(2, 0.92, 0.99), (3, 0.925, 0.985), (5, 0.925, 0.975)])
@pytest.mark.parametrize("ratio", [0.0, 2.0])
def test_seeds_that_differ_cover_the_truth(ratio: float, num_seeds: int, lowest: float, highest: float) -> None:
    """Seeds that differ by some times the standard error of their samples.

    Two or three know little of what varies between them: where that is nothing, intervals are too long, and where it
    is twice the standard error a little too short. Less of the one is more of the other.
    """
    rng = np.random.default_rng(6)
    coefficients = np.hstack([np.eye(num_seeds), -np.ones((num_seeds, 1))])
    covered = 0
    for trial in range(TRIALS):
        before = rng.normal(size=40)
        models = [
            [MeanScores(before + rng.normal(0, ratio / np.sqrt(40)) + rng.normal(size=40))] for _ in range(num_seeds)
        ]
        interval = difference_interval([*models, [MeanScores(before)]], coefficients, seed=trial)
        covered += interval.low <= 0 <= interval.high
    assert lowest <= covered / TRIALS <= highest


def test_seeds_that_agree_by_chance_leave_what_the_samples_say() -> None:
    """Two seeds with the same mean: not known better than their samples make it, nor worse."""
    rng = np.random.default_rng(7)
    before, first, second = rng.normal(size=(3, 100))
    first, second = first - first.mean(), second - second.mean()
    after = [[MeanScores(before + noise)] for noise in (first, second)]
    interval = difference_interval([*after, [MeanScores(before)]], [[1, 0, -1], [0, 1, -1]])
    expected = stats.t.ppf(0.975, 99) * np.std((first + second) / 2, ddof=1) / 10
    assert (interval.high - interval.low) / 2 == pytest.approx(expected, rel=0.15)


def test_a_single_sample_of_a_metric_with_its_own_aggregation_leaves_a_group_without_an_interval() -> None:
    pairs: list[Pair] = [
        (ResampledScores([1.0], max), ResampledScores([0.0], max)),
        losses(np.random.default_rng(9), 30),
    ]
    interval = of_group(pairs)
    assert np.isfinite(interval.delta) and np.isnan([interval.low, interval.high]).all()
