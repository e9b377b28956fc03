"""Paired retention as a metric of 🤗 Evaluate: `evaluate.load(lopt_hf.retention.METRIC_PATH)`."""

import inspect
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from lopt_hf.common.sample_scores import MeanScores
from lopt_hf.common.statistics import mcnemar, paired_interval
from lopt_hf.retention.deltas import check_confidence

__all__ = ["PairedRetention"]


class PairedRetention(evaluate.Metric):
    """The change of a mean score between two models that answered the same samples, with a confidence interval.

    The interval is from the bootstrap over samples. Where scores are 0 or 1 (wrong or right), there is also McNemar's
    exact test, and the numbers of samples that changed in either direction.
    """

    def _info(self) -> evaluate.MetricInfo:
        scores = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description=inspect.getdoc(PairedRetention),
            citation="",
            inputs_description=inspect.getdoc(self._compute),
            features=datasets.Features(scores),
        )

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float], confidence: float = 0.95, seed: int = 0
    ) -> dict[str, Any]:
        """Compares the scores of two models.

        Args:
            predictions: Score of the fine-tuned model on each sample, such as 1 for right and 0 for wrong.
            references: Score of its baseline on the same samples, in the same order.
            confidence: Level of the interval.
            seed: Seed of the resampling.

        Returns:
            baseline, value, delta, low, high, n; and for scores of 0 and 1 p_value, right_to_wrong, wrong_to_right.

        Raises:
            ValueError: If the level is not between 0 and 1.

        Example:

        ```python
        retention = evaluate.load(lopt_hf.retention.METRIC_PATH)
        retention.compute(predictions=[1, 0, 1, 1], references=[1, 1, 0, 1])["delta"]  # 0.0
        ```
        """
        check_confidence(confidence)
        after, before = MeanScores(predictions), MeanScores(references)
        interval = paired_interval(after, before, confidence, seed)
        result: dict[str, Any] = {
            "baseline": before.total,
            "value": after.total,
            "delta": interval.delta,
            "low": interval.low,
            "high": interval.high,
            "n": len(before),
        }
        if before.is_binary and after.is_binary:
            result["p_value"], result["right_to_wrong"], result["wrong_to_right"] = mcnemar(before, after)
        return result
