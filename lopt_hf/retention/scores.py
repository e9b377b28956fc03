"""Scores of a model on each sample of an lm-eval task, and their cache."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from huggingface_hub import constants
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.task import Task
from numpy.typing import NDArray
from transformers.utils import logging

from lopt_hf.common.files import write_text
from lopt_hf.common.sample_scores import MeanScores, RatioScores, ResampledScores, Scores
from lopt_hf.retention.records import read_measured

__all__ = [
    "DEFAULT_CACHE",
    "ScoreCache",
    "TaskScores",
    "infinite_perplexities",
    "metric_scores",
    "on_common_samples",
]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TaskScores:
    """One model's scores on the samples of one task.

    Parameters:
        task: lm-eval's name.
        version: The task's version.
        num_fewshot: Examples in the prompt.
        metrics: For each `metric,filter`, one entry per sample as lm-eval hands it to the metric's aggregation.
        values: For each, the value that lm-eval itself computes from them.
        higher_is_better: For each, its direction; `None` where the task names none.
        samples: For each sample its number in the task and its hash; but for whole texts, which are long, also the
            document, the target and, by filter, the model's responses.
        clusters: The cluster of each sample, where samples belong together (`clusters.with_clusters`); not kept in the
            cache.
        doc_ids: For each metric that only some samples have, such as those whose answer could be read, their numbers
            in the task, one for each entry.
    """

    task: str
    version: str
    num_fewshot: int
    metrics: Mapping[str, Sequence[Any]]
    values: Mapping[str, float]
    higher_is_better: Mapping[str, bool | None]
    samples: Sequence[Mapping[str, Any]]
    clusters: Sequence[int] | None = None
    doc_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def from_lm_eval(cls, task: Task, results: Mapping[str, Any]) -> "TaskScores":
        """Takes one task's scores out of what `lm_eval.evaluate` returns with `log_samples`."""
        name = task.task_name
        logged = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        directions = results["higher_is_better"][name]
        values = results["results"][name]
        per_metric: dict[str, list[tuple[int, Any]]] = {}  # with the sample of each
        per_sample: dict[int, list[Mapping[str, Any]]] = {}  # an entry for each filter
        for entry in logged:
            per_sample.setdefault(entry["doc_id"], []).append(entry)
            for metric in entry["metrics"]:
                per_metric.setdefault(f"{metric},{entry['filter']}", []).append(
                    (entry["doc_id"], _plain(entry[metric]))
                )
        known = {key: items for key, items in per_metric.items() if key in values}
        metrics = {key: [item for _, item in items] for key, items in known.items()}
        keeps_document = task.OUTPUT_TYPE != "loglikelihood_rolling"
        return cls(
            task=name,
            version=str(results["versions"].get(name)),
            num_fewshot=int(results["n-shot"].get(name) or 0),
            metrics=metrics,
            values={key: float(values[key]) for key in metrics},
            higher_is_better={key: _direction(directions.get(key.partition(",")[0])) for key in metrics},
            samples=[_sample(entries, keeps_document) for entries in per_sample.values()],
            doc_ids={key: [n for n, _ in items] for key, items in known.items() if len(items) != len(per_sample)},
        )

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def is_numbered(self) -> bool:
        """Whether it is known which samples each metric's entries are of; earlier versions did not keep it."""
        return all(len(self.doc_ids.get(key, self.samples)) == len(items) for key, items in self.metrics.items())

    def samples_of(self, metric: str) -> Sequence[Mapping[str, Any]]:
        """Returns the samples that a metric's entries are of."""
        return [self.samples[place] for place in self._places(metric)]

    def clusters_of(self, metric: str) -> list[int] | None:
        """Returns the clusters of these samples, numbered from 0; `None` for samples that are independent."""
        if self.clusters is None:
            return None
        numbers: dict[int, int] = {}
        return [numbers.setdefault(self.clusters[place], len(numbers)) for place in self._places(metric)]

    def on(self, metric: str, doc_ids: Collection[int]) -> "TaskScores":
        """Returns these scores with one metric on some of its samples only; without it, if there are none."""
        own = [
            (number, item) for number, item in zip(self._numbers(metric), self.metrics.get(metric, ()), strict=True)
        ]
        kept = [(number, item) for number, item in own if number in doc_ids]
        metrics = {**self.metrics, metric: [item for _, item in kept]}
        if not kept:
            del metrics[metric]
        return replace(self, metrics=metrics, doc_ids={**self.doc_ids, metric: [number for number, _ in kept]})

    def _numbers(self, metric: str) -> list[int]:
        """The samples' numbers in the task."""
        if metric not in self.metrics:
            return []
        given = self.doc_ids.get(metric)
        return [int(sample["doc_id"]) for sample in self.samples] if given is None else list(given)

    def _places(self, metric: str) -> Sequence[int]:
        """Where the samples stand among all."""
        if metric not in self.doc_ids:
            return range(len(self.samples))
        places = {int(sample["doc_id"]): place for place, sample in enumerate(self.samples)}
        return [places[number] for number in self.doc_ids[metric]]


def on_common_samples(models: Sequence[Mapping[str, TaskScores]]) -> list[dict[str, TaskScores]]:
    """Returns the scores of models with each metric on the samples on which all of them have it, for pairing.

    Where that leaves samples out, as of a metric that counts only answers that could be read, one line says so.

    Args:
        models: For each model its scores by task; the tasks of the first count.
    """
    found = [dict(model) for model in models]
    for task in found[0]:
        of_models = [model[task] for model in found if task in model]
        for metric in dict.fromkeys(metric for scores in of_models for metric in scores.metrics):
            if all(metric in scores.metrics and metric not in scores.doc_ids for scores in of_models):
                continue  # on all samples
            numbers = [set(scores._numbers(metric)) for scores in of_models]
            common = set.intersection(*numbers)
            if any(each != common for each in numbers):
                _tell_of_common_samples(task, metric, list(map(len, numbers)), len(common))
                for model in found:
                    if task in model:
                        model[task] = model[task].on(metric, common)
    return found


def _tell_of_common_samples(task: str, metric: str, sizes: Sequence[int], common: int) -> None:
    logger.warning_once(
        "task %s: %s of the models compared have %s on %s samples, and not all on the same: %s.",
        *(task, len(sizes), metric.removesuffix(",none"), ", ".join(map(str, sizes))),
        f"it is compared on the {common} that all have" if common else "none is common, so it is left out",
    )


DEFAULT_CACHE = Path(constants.HF_HOME) / "lopt_hf" / "retention"


class ScoreCache:
    """Keeps scores in a folder, one file for each model, task and settings; a file is there whole or not at all.

    Args:
        folder: Where the files are; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, identity: Mapping[str, Any]) -> Path:
        """The file that holds the scores of `identity`: what was measured, of which model, and how."""
        return self.folder / f"{identity['task']}-{_digest(identity)[:20]}.json"

    def unfinished(self, how: Mapping[str, Any]) -> Path:
        """Beginning of the path where single answers may be kept until a model's scores are written."""
        return self.folder / "unfinished" / _digest(how)[:20]

    @contextmanager
    def alone(self, unfinished: Path) -> Iterator[None]:
        """Waits until no other command gives the same single answers, and keeps others waiting."""
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{unfinished}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("another command measures this model in the same way: waiting for its scores")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def forget(self, unfinished: Path) -> None:
        """Removes the single answers."""
        for path in unfinished.parent.glob(f"{unfinished.name}_rank*.db"):
            path.unlink(missing_ok=True)

    def get(self, identity: Mapping[str, Any]) -> TaskScores | None:
        """The scores, if they are known; a damaged file is warned of, and written again with what is measured."""
        record = read_measured(self.path(identity), "scores")
        if record is None:
            return None
        try:
            scores = TaskScores(**record["scores"])
        except TypeError as error:  # no mapping, or of other fields, as another version may have them
            told = "%s is damaged (%s); what it holds is measured again."
            logger.warning_once(told, self.path(identity), str(error))
            return None
        if not scores.is_numbered:
            told = "%s does not say which samples each score is of, as of an earlier version: measured again"
            logger.warning_once(told, self.path(identity))
            return None
        return scores

    def put(self, identity: Mapping[str, Any], scores: TaskScores) -> None:
        """Writes the scores.

        Raises:
            OSError: If there is no room; nothing written earlier is harmed.
        """
        text = json.dumps({"identity": identity, "scores": asdict(scores)}, default=str)
        write_text(self.path(identity), text)


def metric_scores(items: Sequence[Any], task: Task, metric: str) -> Scores:
    """Makes `Scores` of per-sample entries, by the metric's own aggregation.

    Args:
        items: From `TaskScores.metrics`.
        task: The task, which knows how its metrics are aggregated.
        metric: The metric, without filter.
    """
    aggregate = task.aggregation().get(metric, lm_eval_metrics.mean)  # lm-eval's own rule
    has_nan = any(isinstance(item, float) and math.isnan(item) for item in items)
    if aggregate in (lm_eval_metrics.mean, lm_eval_metrics.nanmean) and not has_nan:
        return MeanScores(items)
    if aggregate is lm_eval_metrics.perplexity:
        return RatioScores([(item, 1.0) for item in items], _perplexity)
    if aggregate is lm_eval_metrics.weighted_perplexity:
        return RatioScores(items, _perplexity)
    if aggregate is lm_eval_metrics.bits_per_byte:
        return RatioScores(items, lambda ratio: -ratio / math.log(2))
    return ResampledScores(items, aggregate)


@contextmanager
def infinite_perplexities(tasks: Sequence[Task]) -> Iterator[None]:
    """Within it, a perplexity that no float can hold is infinite, where lm-eval's own ends with an `OverflowError`.

    Args:
        tasks: The tasks whose metrics are aggregated; they are left as they were.
    """
    for task in tasks:
        task.aggregation = partial(_without_overflow, task.aggregation)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for task in tasks:
            del task.aggregation


def _without_overflow(aggregation: Callable[[], Mapping[str, Callable[..., float]]]) -> dict[str, Any]:
    exponential = (lm_eval_metrics.perplexity, lm_eval_metrics.weighted_perplexity)
    return {
        name: partial(_or_infinite, aggregate) if aggregate in exponential else aggregate
        for name, aggregate in aggregation().items()
    }


def _or_infinite(aggregate: Callable[..., float], items: Sequence[Any]) -> float:
    try:
        return aggregate(items)
    except OverflowError:
        return math.inf


def _perplexity(log_likelihood: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # infinite is what it is
        return np.exp(-log_likelihood)


def _direction(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _sample(entries: Sequence[Mapping[str, Any]], keeps_document: bool) -> dict[str, Any]:
    """One sample from what is logged of it for each filter."""
    first = entries[0]
    sample = {"doc_id": first["doc_id"], "doc_hash": first["doc_hash"]}
    if keeps_document:
        responses = {entry["filter"]: _plain(entry["filtered_resps"]) for entry in entries}
        sample.update(doc=first["doc"], target=first["target"], responses=responses)
    return json.loads(json.dumps(sample, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, bool) else value
