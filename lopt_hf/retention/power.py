"""How many samples a retention benchmark needs to see a change, told beforehand from the baseline's own answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lopt_hf.common.inference import samples_needed, smallest_change
from lopt_hf.common.statistics import difference_interval
from lopt_hf.common.tables import markdown_table
from lopt_hf.retention.deltas import (
    ModelScores,
    entry_metrics,
    entry_scores,
    is_higher_better,
    margin_of,
    task_weights,
)
from lopt_hf.retention.suites import TaskEntry

__all__ = ["DetectableChange", "detectable_changes", "detection_table"]

POWER = 0.8


@dataclass(frozen=True)
class DetectableChange:
    """What the samples of a task can show.

    Parameters:
        task: The task or group.
        metric: Its main metric.
        baseline: The baseline's value.
        standard_error: Of that value; of clusters where samples belong together.
        n: Samples that there are.
        num_clusters: Clusters of them; `None` for single samples.
        change: The change asked for, in the metric's units.
        detectable: The smallest change that they show, in the same units.
        needed: Samples that the change asked for needs; `None` where the baseline's answers do not tell.
    """

    task: str
    metric: str
    baseline: float
    standard_error: float
    n: int
    num_clusters: int | None
    change: float
    detectable: float
    needed: int | None


def detectable_changes(
    entries: Sequence[TaskEntry],
    baseline: ModelScores,
    points: float,
    correlation: float,
    confidence: float = 0.95,
) -> list[DetectableChange]:
    """Returns what each task's samples can show of a change, with 80 % power.

    The standard error of the baseline's own score, clusters included, tells the variance of a sample; the model's is
    taken to be the same, and that of the difference follows from the correlation between both (Miller 2024,
    arXiv 2411.00640, Sec. 5).

    Args:
        entries: The tasks.
        baseline: The baseline's scores.
        points: The change: points of a score from 0 to 1, per cent of the value of other metrics.
        correlation: Between the baseline's and a model's scores of the same sample.
        confidence: Level of the intervals.

    Raises:
        ValueError: If there is no change to see, or the correlation is not between -1 and 1.
    """
    return [_detectable(entry, baseline, points, correlation, confidence) for entry in entries]


def detection_table(changes: Sequence[DetectableChange]) -> str:
    """Returns the changes as a Markdown table."""
    headers = ["Task", "Metric", "Baseline", "Samples", "Change asked for", "Needs", "Enough", "Smallest seen now"]
    rows = [
        [
            change.task,
            change.metric,
            f"{change.baseline:.4f} ± {change.standard_error:.4f}",
            f"{change.n:,}" + ("" if change.num_clusters is None else f" in {change.num_clusters:,} clusters"),
            f"{change.change:.4g}",
            *_verdict(change),
        ]
        for change in changes
    ]
    return markdown_table(headers, rows)


def _verdict(change: DetectableChange) -> list[str]:
    if change.needed is None:
        return ["-", "cannot tell", "-"]
    return [f"{change.needed:,}", "yes" if change.needed <= change.n else "no", f"{change.detectable:.4g}"]


def _detectable(
    entry: TaskEntry, baseline: ModelScores, points: float, correlation: float, confidence: float
) -> DetectableChange:
    name = entry_metrics(entry, baseline)[0]
    parts = entry_scores(entry, name, baseline)
    weights = task_weights(entry, name, parts)
    value = float(np.average([part.total for part in parts], weights=weights))
    interval = difference_interval([parts], [[1.0]], weights, confidence)
    error = float(np.std(interval.draws.mean(axis=0)))
    number = sum(part.num_samples for part in parts)
    change = margin_of(points, is_higher_better(entry, name, baseline), value)
    variance = number * error**2
    if all(part.is_share for part in parts):  # none or all right says little of how many: one of either is added
        share = (value * number + 1) / (number + 2)
        variance = max(variance, share * (1 - share))
    needed, detectable = None, math.nan
    if math.isfinite(variance) and change > 0:
        needed = samples_needed(change, variance, correlation, confidence, POWER)
        detectable = smallest_change(number, variance, correlation, confidence, POWER)
    clusters = interval.num_samples if interval.num_samples < number else None
    return DetectableChange(
        entry.name, name.removesuffix(",none"), value, error, number, clusters, change, detectable, needed
    )
