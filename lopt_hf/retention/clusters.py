"""Clusters of samples that belong together, such as the questions on one passage."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.task import Task

from lopt_hf.common.settings import suggest
from lopt_hf.retention.scores import TaskScores

__all__ = [
    "AUTO",
    "CLUSTER_FIELDS",
    "CLUSTER_HELP",
    "NO_CLUSTERS",
    "check_cluster_field",
    "cluster_labels",
    "with_clusters",
]

AUTO = "auto"
NO_CLUSTERS = "none"

CLUSTER_HELP = (
    "Which samples belong together and are resampled together: a field of the tasks' documents, such as passage; "
    "auto, the usual ones, where ten groups or more share one; or none."
)

# Fields of lm-eval's documents that several samples share, such as BoolQ's passages, RACE's articles, CoQA's stories,
# SQuAD's contexts, HellaSwag's source videos and pages, and the subjects of mixed exams; `cluster` is that of ours
SHARED_TEXTS = ("passage", "article", "story", "context", "paragraph")
CLUSTER_FIELDS = (*SHARED_TEXTS, "source_id", "subject", "subject_name", "cluster")
# With fewer, what varies between them is hardly known; a field that the user names is taken from two clusters on
MIN_AUTO_CLUSTERS = 10


def check_cluster_field(tasks: Sequence[Task], cluster_by: str) -> None:
    """Checks that a field given by the user is one that some task's documents have.

    Raises:
        ValueError: If no task has it.
    """
    if cluster_by in (AUTO, NO_CLUSTERS):
        return
    fields = {name for task in tasks for name in _first(task)}
    if cluster_by not in fields:
        raise ValueError(
            f"cluster_by={cluster_by!r} is {AUTO}, {NO_CLUSTERS}, or a field of the tasks' documents, and none has it "
            f"({suggest(cluster_by, sorted(fields))})."
        )


def cluster_labels(task: Task, doc_ids: Sequence[int], cluster_by: str = AUTO) -> list[int] | None:
    """Returns which samples of a task belong together.

    Args:
        task: The task.
        doc_ids: Its documents, in the order of their scores.
        cluster_by: A field of the documents; `auto` for the first of `CLUSTER_FIELDS` that at least ten groups of
            samples have in common, `none` for samples that are independent.

    Returns:
        The cluster of each sample, numbered from 0 in the order in which they first come; `None` if no samples are to
        be taken together, or the task's documents have no such field.
    """
    if cluster_by == NO_CLUSTERS:
        return None
    names, fewest = (CLUSTER_FIELDS, MIN_AUTO_CLUSTERS) if cluster_by == AUTO else ((cluster_by,), 2)
    documents = list(task.eval_docs)
    chosen: list[Mapping[str, Any]] = [documents[doc_id] for doc_id in doc_ids]
    for name in names:
        if not all(name in document for document in chosen):
            continue
        numbers: dict[str, int] = {}
        labels = [numbers.setdefault(json.dumps(doc[name], default=str), len(numbers)) for doc in chosen]
        if fewest <= len(numbers) < len(labels):
            return labels
    return None


def with_clusters(scores: Mapping[str, TaskScores], tasks: Sequence[Task], cluster_by: str) -> dict[str, TaskScores]:
    """Returns the scores by task, with the clusters of their samples.

    Args:
        scores: One model's scores by task.
        tasks: The tasks.
        cluster_by: As in `cluster_labels`.
    """
    known = {task.task_name: task for task in tasks}
    return {name: replace(found, clusters=_labels(found, known[name], cluster_by)) for name, found in scores.items()}


def _labels(scores: TaskScores, task: Task, cluster_by: str) -> list[int] | None:
    return cluster_labels(task, [int(sample["doc_id"]) for sample in scores.samples], cluster_by)


def _first(task: Task) -> Mapping[str, Any]:
    return next(iter(task.eval_docs))
