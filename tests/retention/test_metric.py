"""The retention metric loads through 🤗 Evaluate, without a hub."""

import evaluate
import numpy as np
import pytest

from lopt_hf.common.sample_scores import MeanScores
from lopt_hf.common.statistics import mcnemar, paired_interval
from lopt_hf.retention import METRIC_PATH


def test_right_and_wrong_answers() -> None:
    """The same figures as the benchmark's own statistics."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 2, 60).astype(float)
    after = np.where(rng.random(60) < 0.2, 1 - before, before)
    result = evaluate.load(METRIC_PATH).compute(predictions=after, references=before)
    interval = paired_interval(MeanScores(after), MeanScores(before))
    p_value, right_to_wrong, wrong_to_right = mcnemar(MeanScores(before), MeanScores(after))
    assert result == {
        "baseline": before.mean(),
        "value": after.mean(),
        "delta": interval.delta,
        "low": interval.low,
        "high": interval.high,
        "n": 60,
        "p_value": p_value,
        "right_to_wrong": right_to_wrong,
        "wrong_to_right": wrong_to_right,
    }


def test_scores_in_between_have_no_mcnemar() -> None:
    metric = evaluate.load(METRIC_PATH)
    result = metric.compute(predictions=[0.5, 0.25, 1.0], references=[0.25, 0.25, 0.5], confidence=0.9)
    assert result["delta"] == pytest.approx(0.25)
    assert "p_value" not in result


@pytest.mark.parametrize("confidence", [95, 0.0, 1.0])
def test_a_level_is_between_0_and_1(confidence: float) -> None:
    metric = evaluate.load(METRIC_PATH)
    with pytest.raises(ValueError, match=f"confidence={confidence} is not between 0 and 1"):
        metric.compute(predictions=[1, 0], references=[0, 1], confidence=confidence)
