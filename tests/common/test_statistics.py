"""Intervals cover what is true, as often as they claim."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from lopt_hf.common import statistics
from lopt_hf.common.sample_scores import MeanScores, RatioScores, ResampledScores, Scores, clustered
from lopt_hf.common.statistics import difference_interval, mcnemar, mean_interval, paired_interval

TRIALS = 2_000
Pair = tuple[Scores, Scores]


def answers(rng: np.random.Generator, number: int = 200, lost: float = 0.10, won: float = 0.06) -> Pair:
    """Right and wrong answers; accuracy falls by `lost - won`."""
    draw = rng.random(number)
    before = draw < 0.5
    after = np.where(draw < lost, False, np.where(draw > 1 - won, True, before))
    return MeanScores(after.astype(float)), MeanScores(before.astype(float))


def losses(rng: np.random.Generator, number: int = 60) -> Pair:
    """Losses that vary a lot from sample to sample, and a small change that does too."""
    before = rng.gamma(4, 0.5, number)
    return MeanScores(before + rng.normal(0.03, 0.1, number)), MeanScores(before)


def documents(rng: np.random.Generator, number: int = 25) -> Pair:
    """Texts of differing length, whose perplexity rises from exp(3.2) to exp(3.22)."""
    words = rng.integers(50, 400, number).astype(float)
    nats = rng.normal(3.2, 0.4, number)
    worse = nats + rng.normal(0.02, 0.04, number)
    return tuple(  # type: ignore[return-value]
        RatioScores(np.column_stack([-loss * words, words]), lambda ratio: np.exp(-ratio)) for loss in (worse, nats)
    )


@pytest.mark.parametrize(
    ("make", "truth"),
    [(answers, -0.04), (losses, 0.03), (documents, np.exp(3.22) - np.exp(3.2))],
    ids=["accuracy", "loss", "perplexity"],
)
def test_intervals_cover_the_truth(
    make: Callable[[np.random.Generator], Pair], truth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2,000 simulated benchmarks, 93 to 97 % of the 95 % intervals hold the true change."""
    monkeypatch.setattr(statistics, "RESAMPLES", 800)
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(TRIALS):
        after, before = make(rng)
        interval = paired_interval(after, before, seed=trial)
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / TRIALS <= 0.97


def test_interval_of_a_mean_over_tasks_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of different size and change."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(1)
    sizes = {150: (0.1, 0.05), 80: (0.05, 0.1), 300: (0.2, 0.1)}
    truth = float(np.mean([won - lost for lost, won in sizes.values()]))
    covered = 0
    for trial in range(TRIALS):
        parts = [
            paired_interval(*pair, seed=trial)
            for pair in (answers(rng, number, lost, won) for number, (lost, won) in sizes.items())
        ]
        interval = mean_interval(parts, seed=trial)
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / TRIALS <= 0.97


def test_interval_of_a_group_of_many_small_tasks_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """57 tasks of 10 samples, the shape of MMLU under `--limit 10`."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(TRIALS // 4):
        pairs = [answers(rng, 10, 0.2, 0.05) for _ in range(57)]
        models = [[pair[side] for pair in pairs] for side in (0, 1)]
        interval = difference_interval(models, [[1, -1]], [1.0] * 57, seed=trial)
        covered += interval.low <= -0.15 <= interval.high
    assert 0.92 <= covered / (TRIALS // 4) <= 0.98


def test_interval_of_a_mean_with_a_small_task_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that changes is four points of 50 samples, of which one time in eight no answer shows it."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(TRIALS // 8):
        pairs = answers(rng, 1_000, 0.005, 0.005), answers(rng, 50, 0.04, 0)
        interval = mean_interval([paired_interval(*pair, seed=trial) for pair in pairs], seed=trial)
        covered += interval.low <= -0.02 <= interval.high
    assert covered / (TRIALS // 8) >= 0.93


@pytest.mark.parametrize("of_seeds", [0.0, 0.01, 0.04], ids=["seeds alike", "seeds differ", "seeds differ a lot"])
def test_interval_over_seeds_covers_the_truth(of_seeds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds, each with flips of its own and, or not, a change of its own.

    The upper end is wider here: a variance known from three seeds makes intervals that are often too long.
    """
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng = np.random.default_rng(2)
    covered = 0
    coefficients = np.hstack([np.eye(3), -np.ones((3, 1))])
    for trial in range(TRIALS):
        before = rng.gamma(4, 0.5, 60)
        common = rng.normal(0, 0.1, 60)
        models = [
            [MeanScores(before + 0.03 + common + rng.normal(0, of_seeds) + rng.normal(0, 0.1, 60))] for _ in range(3)
        ]
        interval = difference_interval([*models, [MeanScores(before)]], coefficients, seed=trial)
        covered += interval.low <= 0.03 <= interval.high
    assert 0.93 <= covered / TRIALS <= 0.985


def test_more_seeds_without_a_difference_make_no_longer_interval() -> None:
    """Seeds that differ by no more than their samples make them: three know more than one."""
    rng = np.random.default_rng(7)
    lengths = []
    for num_seeds in (1, 3):
        total = 0.0
        for trial in range(100):
            before = rng.random(160) < 0.5
            models = [
                [MeanScores(np.where(rng.random(160) < 0.1, ~before, before).astype(float))] for _ in range(num_seeds)
            ]
            coefficients = np.hstack([np.eye(num_seeds), -np.ones((num_seeds, 1))])
            interval = difference_interval([*models, [MeanScores(before.astype(float))]], coefficients, seed=trial)
            total += interval.high - interval.low
        lengths.append(total)
    assert lengths[1] < lengths[0]


def test_pairing_takes_out_what_varies_between_samples() -> None:
    """The interval of the paired difference is far shorter than that of two independent samples."""
    after, before = losses(np.random.default_rng(3), 100)
    paired = paired_interval(after, before)
    shuffled = paired_interval(after, MeanScores(np.random.default_rng(4).permutation(before.values)))  # type: ignore[attr-defined]
    assert (paired.high - paired.low) < 0.2 * (shuffled.high - shuffled.low)


def test_interval_is_scipys_stretched() -> None:
    """On a plain mean difference: `scipy.stats.bootstrap`, BCa, times Student's quantile over the normal one."""
    after, before = losses(np.random.default_rng(5), 40)
    difference = after.values - before.values  # type: ignore[attr-defined]
    expected = stats.bootstrap((difference,), np.mean, n_resamples=4_000, rng=np.random.default_rng(0))
    stretch = stats.t.ppf(0.975, 39) / stats.norm.ppf(0.975) * np.sqrt(40 / 39)
    interval = paired_interval(after, before)
    middle = difference.mean()
    assert interval.delta == pytest.approx(middle)
    assert interval.low == pytest.approx(middle + stretch * (expected.confidence_interval.low - middle))
    assert interval.high == pytest.approx(middle + stretch * (expected.confidence_interval.high - middle))


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("seeds", [1, 3])
def test_an_interval_ends_where_the_difference_does(number: int, seeds: int) -> None:
    """Of two accuracies it is between -1 and 1, of two such differences between -2 and 2, however few the samples."""
    right, wrong = MeanScores(np.ones(number)), MeanScores(np.zeros(number))
    half = MeanScores(np.arange(number) % 2)
    for after, before in ((wrong, right), (right, wrong), (half, right), (half, wrong)):
        models = [[after], [before]]
        once = difference_interval(models, [[1.0, -1.0]] * seeds)
        assert -1 <= once.low <= once.delta <= once.high <= 1
        assert -1 <= mean_interval([once, once]).low and mean_interval([once, once]).high <= 1
        twice = difference_interval([*models, [right], [wrong]], [[1.0, -1.0, 1.0, -1.0]] * seeds)
        assert -2 <= twice.low <= twice.high <= 2 and twice.bounds == (-2.0, 2.0)


def test_no_changes_are_no_certainty() -> None:
    """100 samples without a change do not show that nothing changes: about 3 in 100 could be unseen."""
    same = MeanScores(np.tile([0.0, 1.0], 50))
    interval = paired_interval(same, same)
    assert interval.delta == 0
    assert -0.06 < interval.low < -0.015
    assert 0.015 < interval.high < 0.06


def test_no_changes_of_a_small_task_are_no_certainty_of_a_mean() -> None:
    """56 samples count as much as 3,000 do: what they cannot exclude, the mean of both cannot."""
    before = np.tile([0.0, 1.0], 1_500)
    after = before.copy()
    after[:30] = 1 - after[:30]
    large, small = (MeanScores(after), MeanScores(before)), (MeanScores(before[:56]),) * 2
    losses_alike = (RatioScores(np.column_stack([np.arange(60) / 7, np.ones(60)]), lambda ratio: ratio),) * 2
    parts = [paired_interval(*pair) for pair in (large, small, losses_alike)]
    group = difference_interval(list(zip(large, small, strict=True)), [[1, -1]], weights=[1, 1])
    half = parts[1].high / 2
    for interval, expected in ((group, half), (mean_interval(parts[:2]), half), (mean_interval(parts), 2 / 3 * half)):
        assert interval.delta == 0 and not interval.is_within(0.01)
        assert (-interval.low, interval.high) == pytest.approx((expected, expected), rel=0.1)
    pooled = difference_interval(list(zip(large, small, strict=True)), [[1, -1]], weights=[3_000, 56])
    assert pooled.is_within(0.01)  # where every sample counts the same


def test_identical_scores_in_between_are_no_certainty() -> None:
    """As with right and wrong answers: an unseen change may be what single scores are apart."""
    for number in (5, 100):
        values = np.resize([0, 0.5, 1, 0.25, 0.75], number)
        binary = MeanScores(np.arange(number) % 2)
        for scale in (1, 20):
            same = MeanScores(scale * values)
            interval, expected = paired_interval(same, same), paired_interval(binary, binary)
            assert interval.low < 0 < interval.high and not interval.is_within(scale * 0.01)
            if number == 100:  # where the bounds of an accuracy cut nothing off
                ends = interval.low, interval.high, interval.detectable()
                assert ends == pytest.approx(
                    [scale * end for end in (expected.low, expected.high, expected.detectable())]
                )


def share_right(items: list[list[float]]) -> float:
    """Of all instructions, as IFEval has it."""
    return sum(map(sum, items)) / sum(map(len, items))


FOLLOWED = [[1.0, 0.0], [1.0], [0.0, 1.0, 1.0], [1.0]] * 10


def few_changed(kind: str, changed: int) -> Pair:
    """Forty samples of which the first are worse."""
    if kind == "constant":
        same = MeanScores(np.full(40, 0.3))
        return same, same
    if kind == "ratio":
        before = np.column_stack([-np.linspace(1, 9, 40), np.full(40, 7.0)])
        after = before.copy()
        after[:changed, 0] -= 1
        return tuple(RatioScores(pairs, lambda ratio: np.exp(-ratio)) for pairs in (after, before))  # type: ignore[return-value]
    worse = [[0.0] * len(item) for item in FOLLOWED[:changed]] + FOLLOWED[changed:]
    after, before = ResampledScores(worse, share_right), ResampledScores(FOLLOWED, share_right)
    if kind == "clustered":
        labels = np.arange(40).tolist()
        labels[-1] = 0
        return clustered(after, labels), clustered(before, labels)
    return after, before


@pytest.mark.parametrize("kind", ["constant", "ratio", "own aggregation", "clustered"])
@pytest.mark.parametrize("changed", [0, 1, 4])
def test_few_changes_of_other_metrics_tell_nothing(kind: str, changed: int) -> None:
    """Neither a change nor that there is none, however large the margin; nor does a mean over tasks tell equality."""
    interval = paired_interval(*few_changed(kind, changed))
    assert interval.low <= 0 <= interval.high
    assert not interval.is_within(1e6) and np.isnan([interval.detectable(), interval.p_value]).all()
    mean = mean_interval([interval, paired_interval(*answers(np.random.default_rng(0)))])
    assert not mean.is_within(1e6) and np.isnan(mean.detectable())


@pytest.mark.parametrize("kind", ["ratio", "own aggregation"])
def test_changes_of_other_metrics_are_told_from_five_on(kind: str) -> None:
    interval = paired_interval(*few_changed(kind, 10))
    assert 0 not in (interval.low, interval.high) and interval.low * interval.high > 0
    assert interval.is_within(1e6) and interval.p_value < 0.05


def partial_scores(rng: np.random.Generator) -> np.ndarray:
    """Of 100 samples, as F1 of short answers: most right, others in part or not at all."""
    return np.where(rng.random(100) < 0.6, 1.0, rng.choice([0.0, 0.5], 100))


@pytest.mark.parametrize("changed", [0.03, 0.10])
@pytest.mark.parametrize(
    ("kept", "truth"), [(0.0, -0.7), (0.5, -0.35), (None, 0.0)], ids=["lost", "halved", "another answer"]
)
def test_few_changes_of_scores_in_between_cover_the_truth(
    changed: float, kept: float | None, truth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 answers a few are lost, half of each, or any others: at most 5 % of losses are taken for smaller ones."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(10)
    covered, too_small = 0, 0
    for trial in range(TRIALS // 4):
        before = partial_scores(rng)
        others = partial_scores(rng) if kept is None else kept * before
        after = np.where(rng.random(100) < changed, others, before)
        interval = paired_interval(MeanScores(after), MeanScores(before), seed=trial)
        covered += interval.low <= changed * truth <= interval.high
        too_small += truth < 0 and interval.is_within(0.01)  # less than any of these losses
    assert covered / (TRIALS // 4) >= 0.93
    assert too_small / (TRIALS // 4) <= 0.05


def test_a_few_ties_among_losses_change_nothing() -> None:
    """Fewer than half: as `test_interval_is_scipys_stretched`, with nothing added."""
    after, before = losses(np.random.default_rng(5), 40)
    after.values[:15] = before.values[:15]  # type: ignore[attr-defined]
    interval = paired_interval(after, before)
    assert interval.largest_change == 0 and not interval.has_few_changes
    after.values[:20] = before.values[:20]  # type: ignore[attr-defined]
    apart = np.ptp([after.values, before.values])  # type: ignore[attr-defined]
    assert paired_interval(after, before).largest_change == pytest.approx(apart / 40)


def test_single_sample_has_no_interval() -> None:
    interval = paired_interval(MeanScores([0.5]), MeanScores([0.25]))
    assert interval.delta == 0.25
    assert np.isnan(interval.low) and np.isnan(interval.high)


def test_different_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[3, 4\] samples"):
        paired_interval(MeanScores([0, 1, 0]), MeanScores([0, 1, 0, 1]))


def test_any_metric_can_be_resampled() -> None:
    """A metric with an aggregation of its own gives what the same metric gives as a mean."""
    rng = np.random.default_rng(6)
    before, after = rng.normal(size=50), rng.normal(size=50)
    slow = paired_interval(
        ResampledScores(after.tolist(), lambda items: sum(items) / len(items)),
        ResampledScores(before.tolist(), lambda items: sum(items) / len(items)),
    )
    fast = paired_interval(MeanScores(after), MeanScores(before))
    assert slow.delta == pytest.approx(fast.delta)
    assert slow.low == pytest.approx(fast.low, abs=0.08)
    assert slow.high == pytest.approx(fast.high, abs=0.08)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ruined", [float("inf"), float("nan")])
def test_a_score_that_is_not_finite_has_no_interval(ruined: float) -> None:
    """The other seeds keep their differences, and other tasks theirs."""
    sound, base, broken = MeanScores([1.0, 2.0]), MeanScores([1.0, 1.0]), MeanScores([ruined, 2.0])
    interval = difference_interval([[sound], [broken], [base]], [[1, 0, -1], [0, 1, -1]])
    assert interval.by_seed.tolist() == pytest.approx([0.5, ruined], nan_ok=True)
    assert interval.delta == pytest.approx(ruined, nan_ok=True)
    assert np.isnan([interval.low, interval.high]).all()
    unused = difference_interval([[sound], [broken], [base]], [[1, 0, -1]])
    assert np.isfinite([unused.delta, unused.low, unused.high]).all()


def test_coefficients_weigh_models() -> None:
    """A weighted mean of two models as what is subtracted."""
    model, low, high = ([MeanScores(np.arange(20.0) + shift)] for shift in (2.5, 0, 4))
    assert difference_interval([model, low, high], [[1, -0.25, -0.75]]).delta == pytest.approx(-0.5)


def test_weights_weigh_tasks() -> None:
    tasks = [MeanScores(np.arange(10.0) + shift) for shift in (1, 5)]
    nothing = [MeanScores(np.arange(10.0)) for _ in range(2)]
    assert difference_interval([tasks, nothing], [[1, -1]], weights=[3, 1]).delta == pytest.approx(2)


def test_a_mean_with_a_single_sample_has_no_interval() -> None:
    """Not an interval of no width: one of its parts is unknown."""
    one = paired_interval(MeanScores([0.0]), MeanScores([1.0]))
    mean = mean_interval([one, paired_interval(*answers(np.random.default_rng(8)))])
    assert np.isnan(mean.low) and np.isnan(mean.high)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 1), (12, 30)])
def test_mcnemar_is_the_binomial_test_of_the_changes(lost: int, won: int) -> None:
    """Two-sided, by adding up the binomial probabilities that are no larger; unchanged samples count nothing."""
    before = MeanScores([1] * lost + [0] * won + [1, 0] * 20)
    after = MeanScores([0] * lost + [1] * won + [1, 0] * 20)
    changes = lost + won
    probabilities = stats.binom.pmf(np.arange(changes + 1), changes, 0.5)
    expected = probabilities[probabilities <= probabilities[won] * (1 + 1e-7)].sum()
    p_value, right_to_wrong, wrong_to_right = mcnemar(before, after)
    assert (right_to_wrong, wrong_to_right) == (lost, won)
    assert p_value == pytest.approx(expected)
