"""Differences between methods, at the same rate and at the same gain, against figures worked out by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lopt_hf.compare.contrasts import Margin, MethodPoint, matched_contrasts, rate_contrasts
from lopt_hf.retention.heldout import ANSWER_METRIC, HELDOUT_TASK
from lopt_hf.retention.scores import TaskScores
from lopt_hf.retention.suites import TaskEntry

SAMPLES = 40
RNG = np.random.default_rng(0)
HARDNESS = RNG.normal(0, 1, SAMPLES)  # of each sample, for all models
ANSWERS = RNG.normal(0, 0.2, SAMPLES)


class StubTask:
    """What the statistics ask of an lm-eval task."""

    task_name = "kept"

    def aggregation(self) -> dict[str, Any]:
        from lm_eval.api.metrics import mean

        return {"score": mean}


ENTRY = TaskEntry("kept", (StubTask(),))  # type: ignore[arg-type]


def scores(kept: float, loss: float) -> dict[str, TaskScores]:
    """A model whose mean score is `kept` and whose held-out answers cost `loss`, up to each sample's own part."""
    samples = [{"doc": {"num_tokens": 10}}] * SAMPLES
    log_likelihoods = (-10 * (loss + ANSWERS - ANSWERS.mean())).tolist()
    values = (kept + HARDNESS - HARDNESS.mean()).tolist()
    return {
        "kept": TaskScores("kept", "1", 0, {"score,none": values}, {}, {"score,none": True}, samples),
        HELDOUT_TASK: TaskScores(
            HELDOUT_TASK, "1", 0, {ANSWER_METRIC: log_likelihoods}, {}, {ANSWER_METRIC: False}, samples
        ),
    }


def point(label: str, rate: float, seeds: Sequence[tuple[float, float]]) -> MethodPoint:
    return MethodPoint(label, rate, [scores(*seed) for seed in seeds])


BASE = scores(kept=0.0, loss=2.0)
MARGIN = Margin(2.0, BASE)
# Gains of 0.5 and 1.0, which cost 0.1 and 0.4; the third seed forgets a little more
SECOND = [
    point("B, 1", 1.0, [(-0.1, 1.5), (-0.1, 1.5), (-0.13, 1.5)]),
    point("B, 2", 2.0, [(-0.4, 1.0), (-0.4, 1.0), (-0.43, 1.0)]),
]


def test_difference_at_the_same_rate() -> None:
    first = [point("A, 1", 1.0, [(-0.05, 1.7), (-0.07, 1.7), (-0.06, 1.7)])]
    gain, kept = rate_contrasts(first, SECOND, [ENTRY], 0.95, MARGIN)
    assert (gain.task, gain.second, gain.seeds) == (HELDOUT_TASK, "B, 1", 3)
    assert gain.difference == pytest.approx(0.2)
    assert gain.verdict == "B, 1"  # a lower loss is better
    assert kept.difference == pytest.approx(-0.06 + 0.11)
    # By Student's t over the three seeds; the samples differ by a constant
    spread = np.std([0.05, 0.03, 0.07], ddof=1) / np.sqrt(3) * 4.302653
    assert (kept.low, kept.high) == pytest.approx((0.05 - spread, 0.05 + spread), abs=1e-6)


@pytest.mark.parametrize(
    ("gain", "on_the_line"),
    [(0.25, [-0.05, -0.05, -0.065]), (0.75, [-0.25, -0.25, -0.28])],
    ids=["between the baseline and the first rate", "between the rates"],
)
def test_difference_at_the_same_gain(gain: float, on_the_line: list[float]) -> None:
    first = [point("A, 1", 1.0, [(-0.2, 2 - gain)] * 3)]
    (kept,) = matched_contrasts(first, SECOND, BASE, [ENTRY], 0.95, MARGIN)
    assert kept.second == "B at the same gain"
    assert kept.difference == pytest.approx(-0.2 - np.mean(on_the_line))


def test_margin_is_of_the_baseline() -> None:
    """Two per cent of its loss of 2.0, whichever method comes first, and two points of a score."""
    first = [point("A, 1", 1.0, [(-0.1, loss) for loss in (1.499, 1.5, 1.502)])]  # exactly the same would tell nothing
    for pair in ((first, SECOND), (SECOND, first)):
        gain, kept = rate_contrasts(*pair, [ENTRY], 0.95, MARGIN)
        assert gain.margin == pytest.approx(0.04) and kept.margin == pytest.approx(0.02)
    assert gain.verdict == "no difference larger than 0.04"
    (matched,) = matched_contrasts([point("A, 1", 1.0, [(-0.2, 1.75)] * 3)], SECOND, BASE, [ENTRY], 0.95, MARGIN)
    assert matched.margin == pytest.approx(0.02)


def test_gains_beyond_the_line_are_not_compared() -> None:
    """One seed outside is enough: there is nothing to compare it with, and the contrast says so."""
    first = [point("A, 1", 1.0, [(-0.2, 1.2), (-0.2, 1.2), (-0.2, 0.9)])]
    (kept,) = matched_contrasts(first, SECOND, BASE, [ENTRY], 0.95, MARGIN)
    assert np.isnan(kept.difference)
    assert kept.verdict == "beyond its line" and kept.margin == pytest.approx(0.02)


def test_two_diverged_models_are_no_numbers_apart() -> None:
    """No line is missing there: both have the infinite value that is subtracted."""
    ruined = [point(label, 1.0, [(-np.inf, 1.5)] * 3) for label in ("A, 1", "B, 1")]
    _, kept = rate_contrasts(ruined[:1], ruined[1:], [ENTRY], 0.95, MARGIN)
    assert np.isnan(kept.difference) and kept.verdict == "not a number"


def test_a_rate_that_gains_less_ends_the_line() -> None:
    """A ruined model is no point on the way to a gain that lower rates reach better."""
    ruined = [*SECOND, point("B, 3", 3.0, [(-5.0, 1.4)] * 3)]
    first = [point("A, 1", 1.0, [(-0.2, 1.45)] * 3)]
    (expected,) = matched_contrasts(first, SECOND, BASE, [ENTRY], 0.95, MARGIN)
    (kept,) = matched_contrasts(first, ruined, BASE, [ENTRY], 0.95, MARGIN)
    assert kept == expected
