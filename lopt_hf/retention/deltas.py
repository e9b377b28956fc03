"""Paired changes from scores: of each task and group, of their mean, and of held-out answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.task import Task
from numpy.typing import NDArray
from transformers.utils import logging

from lopt_hf.common.sample_scores import MeanScores, Scores, clustered
from lopt_hf.common.statistics import Interval, difference_interval, mcnemar, mean_interval
from lopt_hf.retention.heldout import ANSWER_METRIC, HELDOUT_TASK, answer_scores
from lopt_hf.retention.results import Delta
from lopt_hf.retention.scores import TaskScores, metric_scores, on_common_samples
from lopt_hf.retention.suites import TaskEntry

__all__ = [
    "MARGIN",
    "MARGIN_HELP",
    "ModelScores",
    "against_one",
    "check_change",
    "check_confidence",
    "entry_deltas",
    "entry_metrics",
    "entry_scores",
    "gain_delta",
    "gain_scores",
    "is_higher_better",
    "margin_of",
    "mean_delta",
    "task_weights",
]

MARGIN = 1.0  # ours, as `points` of `margin_of`
MARGIN_HELP = (
    "Change below which two models are taken to be equal: points of a score from 0 to 1, per cent of the baseline's "
    "value of other metrics."
)

# One model's scores by task
ModelScores = Mapping[str, TaskScores]

logger = logging.get_logger(__name__)


def entry_metrics(entry: TaskEntry, scores: ModelScores) -> list[str]:
    """Returns the `metric,filter` names of a task or group, the main one first; of a group those that any task has."""
    names = list(entry.group_metrics or scores[entry.tasks[0].task_name].metrics)
    names = [name for name in names if _tasks_with(entry, name, scores)]
    if not names and not entry.group_metrics:
        raise ValueError(f"task {entry.name!r} has no metric that all models have; leave the task out.")
    if not names:
        raise ValueError(f"no task of the group {entry.name!r} has its metrics {', '.join(entry.group_metrics)}.")
    if entry.main_metric is None:
        return names
    if entry.main_metric not in names:
        raise ValueError(f"main metric {entry.main_metric!r} of {entry.name!r} is none of {', '.join(names)}.")
    return [entry.main_metric, *(name for name in names if name != entry.main_metric)]


def entry_scores(entry: TaskEntry, name: str, scores: ModelScores) -> list[Scores]:
    """Returns the scores of one metric, one `Scores` for each task of the entry that has it.

    Where the samples of a task belong together (`TaskScores.clusters`), they are the scores of clusters.
    """
    clusters = [scores[task.task_name].clusters_of(name) for task in _tasks_with(entry, name, scores)]
    return [clustered(*part) for part in zip(_sample_scores(entry, name, scores), clusters, strict=True)]


def is_higher_better(entry: TaskEntry, name: str, scores: ModelScores) -> bool | None:
    """Returns whether more of a metric is better; `None`, and one line, where its tasks do not say or differ."""
    directions = {scores[task.task_name].higher_is_better[name] for task in _tasks_with(entry, name, scores)}
    if len(directions) == 1 and None not in directions:
        return directions.pop()
    logger.warning_once(
        "task %s does not say whether a higher %s is better: neither better nor worse is said of it, and it is in no "
        "mean over tasks; `higher_is_better: true` or `false` in the task's metric_list would say it.",
        entry.name,
        name.removesuffix(",none"),
    )
    return None


def check_change(name: str, points: float) -> None:
    """Checks a setting that is the size of a change.

    Args:
        name: The setting.
        points: Its value.

    Raises:
        ValueError: If it is not above 0, or not finite.
    """
    if not 0 < points < math.inf:
        raise ValueError(f"{name}={points} is no change; give one above 0, such as 1 for one point.")


def check_confidence(confidence: float) -> None:
    """Checks the level of the intervals.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not between 0 and 1; 0.95 is usual.")


def margin_of(points: float, higher_is_better: bool | None, baseline: float) -> float:
    """Returns the change below which two values are taken to be equal, in the metric's units.

    Args:
        points: In points of a score from 0 to 1, 1 being best; of other metrics in per cent of the baseline's value.
        higher_is_better: Direction of the metric; `None` if it has none.
        baseline: The baseline's value.
    """
    return points / 100 * (1.0 if _is_score(higher_is_better, baseline) else abs(baseline))


def entry_deltas(
    entry: TaskEntry,
    before: ModelScores,
    after: Sequence[ModelScores],
    confidence: float,
    margin: float,
) -> list[tuple[Delta, Interval]]:
    """Returns the paired change of each metric of a task or group, on the samples on which all models have it.

    Args:
        entry: The task or group.
        before: The baseline's scores.
        after: The model's; of several seeds the mean counts, and the interval includes what varies between them.
        confidence: Level of the intervals.
        margin: As `points` of `margin_of`.
    """
    before, *after = on_common_samples([before, *after])
    return [_entry_delta(entry, name, before, after, confidence, margin) for name in entry_metrics(entry, before)]


def mean_delta(main: Sequence[tuple[Delta, Interval]], confidence: float, margin: float) -> Delta | None:
    """Returns the mean change over tasks with a score from 0 to 1, 1 being best; `None` with fewer than two.

    Args:
        main: Each task's main metric. Which of them count is decided by the baseline alone.
        confidence: Level of the interval.
        margin: As in `entry_deltas`.
    """
    chosen = [(delta, interval) for delta, interval in main if _is_score(delta.higher_is_better, delta.baseline)]
    if len(chosen) < 2:
        return None
    interval = mean_interval([interval for _, interval in chosen], confidence)
    baseline = float(np.mean([delta.baseline for delta, _ in chosen]))
    number = sum(delta.n for delta, _ in chosen)
    return _delta(f"mean of {len(chosen)} tasks", "score", True, baseline, interval, number, margin)


def gain_scores(scores: ModelScores) -> Scores:
    """Returns the loss of held-out answers as scores."""
    heldout = scores[HELDOUT_TASK]
    num_tokens = [int(sample["doc"]["num_tokens"]) for sample in heldout.samples]
    return clustered(answer_scores(heldout.metrics[ANSWER_METRIC], num_tokens), heldout.clusters)


def gain_delta(before: ModelScores, after: Sequence[ModelScores], confidence: float, margin: float) -> Delta | None:
    """Returns the change in the loss of held-out answers; `None` if there are none."""
    if HELDOUT_TASK not in before:
        return None
    baseline = gain_scores(before)
    models = [[gain_scores(scores)] for scores in after]
    interval = difference_interval([*models, [baseline]], against_one(len(models)), confidence=confidence)
    number = baseline.num_samples
    return _delta(HELDOUT_TASK, "answer_loss", False, baseline.total, interval, number, margin)


def _delta(
    task: str,
    metric: str,
    higher_is_better: bool | None,
    baseline: float,
    interval: Interval,
    n: int,
    margin: float,
    **changes: Any,
) -> Delta:
    """The change that an interval is of."""
    value, ends = baseline + interval.delta, (interval.low, interval.high)
    equal = margin_of(margin, higher_is_better, baseline)
    return Delta(
        *(task, metric, higher_is_better, baseline, value, interval.delta, *ends, n, equal),
        detectable=interval.detectable(),
        is_within_margin=interval.is_within(equal),
        num_clusters=interval.num_samples if interval.num_samples < n else None,
        p_interval=interval.p_value,
        **changes,
    )


def _is_score(higher_is_better: bool | None, baseline: float) -> bool:
    """Whether a metric is taken for a score from 0 to 1, 1 being best, by its direction and the baseline's value."""
    return bool(higher_is_better) and 0 <= baseline <= 1


def _sample_scores(entry: TaskEntry, name: str, scores: ModelScores) -> list[Scores]:
    metric = name.partition(",")[0]
    tasks = _tasks_with(entry, name, scores)
    return [metric_scores(scores[task.task_name].metrics[name], task, metric) for task in tasks]


def _tasks_with(entry: TaskEntry, name: str, scores: ModelScores) -> list[Task]:
    """The tasks of an entry that have a metric; lm-eval aggregates a group over these too."""
    return [task for task in entry.tasks if name in scores[task.task_name].metrics]


def _entry_delta(
    entry: TaskEntry,
    name: str,
    before: ModelScores,
    after: Sequence[ModelScores],
    confidence: float,
    margin: float,
) -> tuple[Delta, Interval]:
    baseline = entry_scores(entry, name, before)
    models = [entry_scores(entry, name, scores) for scores in after]
    weights = task_weights(entry, name, baseline)
    interval = difference_interval([*models, baseline], against_one(len(models)), weights, confidence)
    value = float(np.average([part.total for part in baseline], weights=weights))
    higher, number = is_higher_better(entry, name, before), sum(part.num_samples for part in baseline)
    changes = {}
    if len(models) == 1 and _is_pooled(weights, baseline):
        changes = _changes(_sample_scores(entry, name, before), _sample_scores(entry, name, after[0]), higher)
        if changes and any(before[task.task_name].clusters for task in _tasks_with(entry, name, before)):
            del changes["p_value"]  # McNemar's test takes the samples for independent
    metric = name.removesuffix(",none")
    return _delta(entry.name, metric, higher, value, interval, number, margin, **changes), interval


def task_weights(entry: TaskEntry, name: str, parts: Sequence[Scores]) -> list[float]:
    """Returns the weight of each task in an entry: its size, or the same for all, as the group says."""
    return [float(part.num_samples) if entry.group_metrics.get(name, True) else 1.0 for part in parts]


def against_one(num_seeds: int) -> NDArray[Any]:
    """Returns the coefficients of each seed's model minus one baseline, which comes last."""
    return np.hstack([np.eye(num_seeds), -np.ones((num_seeds, 1))])


def _is_pooled(weights: Sequence[float], parts: Sequence[Scores]) -> bool:
    """Whether every sample counts the same, so that a test on all of them is about the same quantity."""
    return len({weight / part.num_samples for weight, part in zip(weights, parts, strict=True)}) == 1


def _changes(before: Sequence[Scores], after: Sequence[Scores], higher_is_better: bool | None) -> dict[str, Any]:
    """McNemar's test over all samples, where each is right or wrong; which is which is the metric's direction."""
    binary = [
        (old, new)
        for old, new in zip(before, after, strict=True)
        if isinstance(old, MeanScores) and isinstance(new, MeanScores) and old.is_binary and new.is_binary
    ]
    if len(binary) < len(before):
        return {}
    pooled = [MeanScores(np.concatenate([pair[side].values for pair in binary])) for side in (0, 1)]
    p_value, lowered, raised = mcnemar(*pooled)
    if higher_is_better is None:
        return {"p_value": p_value}
    worse, better = (lowered, raised) if higher_is_better else (raised, lowered)
    return {"p_value": p_value, "right_to_wrong": worse, "wrong_to_right": better}
