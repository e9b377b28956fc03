"""The retention benchmark: a baseline and models fine-tuned from it, measured on the same samples."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import AutoConfig

from lopt_hf.common.arithmetic import Arithmetic, choose_arithmetic, choose_for_saved
from lopt_hf.common.files import atomic_file, write_text
from lopt_hf.retention.clusters import AUTO, check_cluster_field, with_clusters
from lopt_hf.retention.comparisons import adjusted
from lopt_hf.retention.cost import describe_device
from lopt_hf.retention.deltas import (
    MARGIN,
    ModelScores,
    check_change,
    check_confidence,
    entry_deltas,
    gain_delta,
    mean_delta,
)
from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_model, score_identities
from lopt_hf.retention.heldout import HELDOUT_TASK, heldout_task
from lopt_hf.retention.identity import VERSIONS, effective_fewshot
from lopt_hf.retention.layer_drift import layer_drift
from lopt_hf.retention.lengths import listed
from lopt_hf.retention.records import read_measured
from lopt_hf.retention.references import ModelReference, fingerprint, load_tokenizer
from lopt_hf.retention.results import ModelResult, RetentionReport
from lopt_hf.retention.scores import ScoreCache, on_common_samples
from lopt_hf.retention.suites import TaskEntry

__all__ = ["Candidate", "RetentionBenchmark", "check_candidates", "describe_machine", "flips", "write_flips"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A model that is compared with the baseline, or the seeds of one method.

    Parameters:
        label: Name in the report.
        group: As in `ModelResult`.
        models: Hub ids or folders; more than one are seeds.
    """

    label: str
    group: str
    models: tuple[str, ...]


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Checks that there are models, under names that differ.

    Raises:
        ValueError: If not.
    """
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) < len(labels) or not labels:
        raise ValueError(f"models {labels} must be at least one, and each named once.")


class RetentionBenchmark:
    """Evaluates models, and compares each with their baseline.

    Args:
        baseline: Folder or hub id of the untouched base; a revision may follow an id, as in `org/name@v1`.
        entries: Tasks that measure what was kept (`load_entries`).
        settings: How to measure.
        cache: Where scores are kept.
        heldout: Rows with `prompt` and `completion` of the task trained on; their answers' loss is the gain.
        confidence: Level of all intervals.
        margin: Change below which two models are taken to be equal: points of a score from 0 to 1, per cent of the
            baseline's value of other metrics (`deltas.margin_of`).
        cluster_by: Which samples belong together: a field of the tasks' documents, `auto` or `none`
            (`clusters.cluster_labels`).
        adapter_base: Base of the models that are adapters, in place of those that they name.

    Raises:
        ValueError: If there is no such baseline, held-out data cannot be used, or samples are asked for of a task that
            is not measured.
    """

    def __init__(
        self,
        baseline: str,
        entries: Sequence[TaskEntry],
        settings: EvaluationSettings,
        cache: ScoreCache,
        heldout: Sequence[Mapping[str, Any]] = (),
        confidence: float = 0.95,
        adapter_base: str | None = None,
        margin: float = MARGIN,
        cluster_by: str = AUTO,
    ) -> None:
        check_confidence(confidence)
        check_change("margin", margin)
        check_cluster_field([task for entry in entries for task in entry.tasks], cluster_by)
        known = [task.task_name for entry in entries for task in entry.tasks]
        for name in settings.samples:
            if name not in known:
                raise ValueError(
                    f"samples are given for {name!r}, which is not measured; tasks are {', '.join(known)}."
                )
        _tell_of_fixed_examples(entries, settings.num_fewshot)
        self._adapter_base = adapter_base
        self.baseline = ModelReference.find(baseline, adapter_base)
        self.entries = list(entries)
        self.arithmetic = _choose_arithmetic(settings.dtype, self.baseline)
        self.settings = replace(settings, dtype=self.arithmetic.dtype)
        self.cache = cache
        self.confidence = confidence
        self.margin = margin
        self.cluster_by = cluster_by
        self._tokenizer = load_tokenizer(self.baseline)
        self._references = {baseline: self.baseline}
        self._scores: dict[str, ModelScores] = {}
        self._heldout = [TaskEntry(HELDOUT_TASK, (heldout_task(heldout, self._tokenizer),))] if heldout else []

    def scores(self, model: str) -> ModelScores:
        """Returns the scores of one model on every task, from the cache where it has them.

        Raises:
            ValueError: If there is no such model, or its vocabulary is not the baseline's.
        """
        if model not in self._scores:
            reference = self.reference(model)
            entries = [*self._heldout, *self.entries]
            found = evaluate_model(reference, entries, self.settings, self.cache)
            self._scores[model] = with_clusters(found, [t for each in entries for t in each.tasks], self.cluster_by)
        return self._scores[model]

    def score_files(self, model: str) -> list[Path]:
        """The files that hold a model's scores, or will: each is named by all that decides them.

        Raises:
            ValueError: As `reference`.
        """
        identities = score_identities(self.reference(model), [*self._heldout, *self.entries], self.settings)
        return [self.cache.path(identity) for identity in identities.values()]

    def reference(self, model: str) -> ModelReference:
        """Finds a model and checks that it can be compared.

        Raises:
            ValueError: If there is no such model, or its vocabulary is not the baseline's.
        """
        if model in self._references:
            return self._references[model]
        reference = ModelReference.find(model, self._adapter_base)
        own, base = load_tokenizer(reference).get_vocab(), self._tokenizer.get_vocab()
        if own != base:
            differing = sum(base.get(token) != index for token, index in own.items())
            raise ValueError(
                f"model {model!r} has a vocabulary of {len(own)} tokens of which {differing} are not the baseline's "
                f"({len(base)} tokens), so likelihoods cannot be compared; give the baseline that it was fine-tuned "
                "from."
            )
        if reference.adapter is not None and not self._is_base(reference):
            logger.warning(
                "model %r is an adapter of %s, which is not the baseline %s: not all that changed is its own doing",
                model,
                reference.base,
                self.baseline.name,
            )
        self._references[model] = reference
        return reference

    def _is_base(self, adapted: ModelReference) -> bool:
        """Whether an adapter's base is the baseline's full model."""
        one, other = ((Path(each.base).resolve(), each.revision) for each in (adapted, self.baseline))  # or ids
        if one == other:
            return True
        return fingerprint(adapted.base, adapted.revision) == fingerprint(self.baseline.base, self.baseline.revision)

    def compare(self, candidates: Sequence[Candidate], with_drift: bool = True) -> RetentionReport | None:
        """Measures the baseline, then all candidates.

        Args:
            candidates: Models, or methods with their seeds.
            with_drift: Also compare the weights layer by layer.

        Returns:
            The report; `None` on other processes than the first.
        """
        check_candidates(candidates)
        for candidate in candidates:  # before anything takes time
            for model in candidate.models:
                self.reference(model)
        is_main = PartialState().is_main_process
        before = self.scores(self.baseline.name)
        measured = [
            [self.scores(model) for model in candidate.models]
            for candidate in tqdm(candidates, desc="models", unit="model", disable=not is_main)
        ]
        if not is_main:  # what follows is for one process, and none has to wait for it
            return None
        results = tuple(
            self.result(candidate, before, after, self._drift(candidate) if with_drift else {})
            for candidate, after in zip(candidates, measured, strict=True)
        )
        return adjusted(RetentionReport(self.baseline.name, results, self.describe(before), self.confidence))

    def result(
        self, candidate: Candidate, before: ModelScores, after: Sequence[ModelScores], drift: Mapping[str, float]
    ) -> ModelResult:
        """Turns scores into changes with their intervals."""
        seeds = tuple(
            self.result(Candidate(model, candidate.group, (model,)), before, [scores], {})
            for model, scores in zip(candidate.models, after, strict=True)
            if len(after) > 1
        )
        how = self.confidence, self.margin
        found = [entry_deltas(entry, before, after, *how) for entry in self.entries]
        return ModelResult(
            label=candidate.label,
            group=candidate.group,
            deltas=tuple(delta for entry in found for delta, _ in entry),
            mean=mean_delta([entry[0] for entry in found], *how),
            gain=gain_delta(before, after, *how),
            drift=drift,
            seeds=seeds,
        )

    def describe(self, before: ModelScores) -> dict[str, Any]:
        """Returns what was evaluated and how, for the report."""
        tasks = [
            f"{task.task} (version {task.version}, {task.num_fewshot}-shot, n = {len(task)})"
            for task in before.values()
        ]
        settings = {name: value for name, value in asdict(self.settings).items() if value not in (None, {})}
        judged = {"margin": self.margin, "cluster_by": self.cluster_by}
        return {"baseline": self.baseline.name, "tasks": tasks, **settings, **judged, **describe_machine()}

    def _drift(self, candidate: Candidate) -> dict[str, float]:
        """Mean drift over the candidate's models, kept beside the scores; none if there is none to tell."""
        try:
            found = [self._cached_drift(self.reference(model)) for model in candidate.models]
        except ValueError as error:
            logger.warning("%s: its drift is left out: %s", candidate.label, error)
            return {}
        return {part: sum(drift[part] for drift in found) / len(found) for part in found[0]}

    def _cached_drift(self, reference: ModelReference) -> dict[str, float]:
        pair = f"{reference.fingerprint()} {self.baseline.fingerprint()} in the model's dtype"
        path = self.cache.folder / f"drift-{hashlib.sha256(pair.encode()).hexdigest()[:20]}.json"
        drift = read_measured(path)
        if drift is None:
            drift = layer_drift(self.baseline, reference)
            write_text(path, json.dumps(drift))
        return drift


def _tell_of_fixed_examples(entries: Sequence[TaskEntry], num_fewshot: int | None) -> None:
    """Says which tasks are asked without examples whatever number is given."""
    tasks = {task.task_name: task for entry in entries for task in entry.tasks}
    fixed = [name for name, task in tasks.items() if effective_fewshot(task, num_fewshot) != num_fewshot]
    if num_fewshot is not None and fixed:
        logger.warning(
            "num_fewshot=%s is not for %s: by their own configuration they are asked without examples.",
            num_fewshot,
            listed(fixed),
        )


def _choose_arithmetic(dtype: str, baseline: ModelReference) -> Arithmetic:
    """The type of all models; the first process's choice, where several measure the machine at once."""
    if dtype == "auto":
        config = AutoConfig.from_pretrained(baseline.base, revision=baseline.revision)
        saved = config.dtype or torch.float32  # of a model that names none, as transformers has it
        chosen = choose_for_saved(str(saved).removeprefix("torch."), "the baseline")
    elif dtype == "float16":
        chosen = replace(choose_arithmetic("float32"), dtype=dtype)
    else:
        chosen = choose_arithmetic(dtype)
    return broadcast_object_list([chosen])[0]


def flips(label: str, before: ModelScores, after: ModelScores) -> Iterator[dict[str, Any]]:
    """Finds the samples that a model answers correctly and its baseline does not, or the reverse.

    Yields:
        Rows with model, task, metric, sample number, direction, document, target, and both models' responses, as the
        metric's filter left them. The direction is `right to wrong` or the reverse, by whether higher is better; where
        the task does not say that, `1 to 0` or the reverse.
    """
    before, after = on_common_samples([before, after])
    for task, baseline in before.items():
        model = after[task]
        for metric, values in baseline.metrics.items():
            pairs = list(zip(values, model.metrics[metric], strict=True))
            if not all(value in (0, 1) for pair in pairs for value in pair if isinstance(value, int | float)):
                continue
            samples = zip(baseline.samples_of(metric), model.samples_of(metric), strict=True)
            for (old, new), of_both in zip(pairs, samples, strict=True):
                if isinstance(old, int | float) and old != new:
                    yield _flip(label, task, metric, _direction(baseline.higher_is_better[metric], old == 1), *of_both)


def _direction(higher_is_better: bool | None, is_lowered: bool) -> str:
    """What an answer whose value fell from 1 to 0, or rose, has become."""
    if higher_is_better is None:
        return "1 to 0" if is_lowered else "0 to 1"
    return "right to wrong" if is_lowered == higher_is_better else "wrong to right"


def _flip(
    label: str, task: str, metric: str, direction: str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
    of_filter = metric.partition(",")[2]
    return {
        "model": label,
        "task": task,
        "metric": metric,
        "doc_id": old["doc_id"],
        "direction": direction,
        "doc": old.get("doc"),
        "target": old.get("target"),
        "baseline_responses": old.get("responses", {}).get(of_filter),
        "model_responses": new.get("responses", {}).get(of_filter),
    }


def describe_machine() -> dict[str, Any]:
    """Returns the versions and the hardware of a measurement."""
    return {"device": describe_device(), **VERSIONS}


def write_flips(rows: Iterator[Mapping[str, Any]], path: Path) -> int:
    """Writes rows as JSON lines, and returns how many."""
    count = 0
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            count += 1
    return count
