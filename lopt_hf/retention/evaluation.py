"""Evaluation of a model on tasks with lm-eval, once for each model, task and setting."""

import errno
import random
import re
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from lopt_hf.common.upstream.lm_eval import set_model, set_process
from lopt_hf.retention.answers import KeptAnswers
from lopt_hf.retention.cost import told_cost
from lopt_hf.retention.evaluation_settings import EvaluationSettings
from lopt_hf.retention.identity import SOFTMAX_DTYPE, effective_fewshot, settings_identity, task_identity
from lopt_hf.retention.lengths import check_max_length, check_written, listed
from lopt_hf.retention.references import ModelReference, load_tokenizer
from lopt_hf.retention.scores import ScoreCache, TaskScores, infinite_perplexities
from lopt_hf.retention.suites import TaskEntry
from lopt_hf.retention.weights import auto_class_of, load_adapter, load_full

__all__ = [
    "EvaluationSettings",
    "answer_seconds",
    "evaluate_model",
    "evaluate_tasks",
    "load_language_model",
    "score_identities",
]

logger = logging.get_logger(__name__)

# How an error of NLTK, which is a plain LookupError, says what is missing
NLTK_RESOURCE = re.compile(r"nltk\.download\('(\w+)'\)")


def load_language_model(reference: ModelReference, settings: EvaluationSettings) -> HFLM:
    """Loads a model for lm-eval, on one device or on those of `accelerate launch`.

    Raises:
        ValueError: If weights are missing, damaged or of other shapes, or the model cannot read `max_length` tokens.
    """
    check_max_length(reference, settings.max_length)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = _LanguageModel(
        reference,
        pretrained=reference.base,
        revision=reference.revision or "main",
        dtype=settings.dtype,
        softmax_dtype=SOFTMAX_DTYPE,
        device=str(device),
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        tokenizer=load_tokenizer(reference),
    )
    if reference.adapter is not None:  # not by lm-eval, which cuts off embeddings beyond the tokenizer's size
        set_model(model, load_adapter(model.model, reference).eval())
    state = PartialState()
    if state.num_processes > 1 and model.world_size == 1:  # lm-eval shares samples out among accelerators only
        set_process(model, state.process_index, state.num_processes)
    return model


def evaluate_model(
    reference: ModelReference, entries: Iterable[TaskEntry], settings: EvaluationSettings, cache: ScoreCache
) -> dict[str, TaskScores]:
    """Scores a model on every task; loads it only if something is not in the cache.

    Args:
        reference: The model.
        entries: The tasks.
        settings: How to measure.
        cache: Where scores are kept; single answers too, from when they are given until the scores are written.

    Returns:
        Scores by task; on other processes than the first only what was in the cache.

    Raises:
        ValueError: If a sample is asked for that a task does not have, or as in `evaluate_tasks`.
        OSError: If there is no room for a task's scores; those of earlier tasks are kept.
    """
    state = PartialState()
    how = {"model": reference.fingerprint(), **settings_identity(settings)}
    by_fewshot = _by_fewshot(entries, settings)
    identities = _identities(how, by_fewshot, settings)
    known: dict[str, TaskScores] = {}

    def look(tasks: Iterable[Task]) -> list[Task]:
        """Takes what is in the cache, and returns what is not."""
        for name in (task.task_name for task in tasks):
            if name not in known and (scores := cache.get(identities[name])) is not None:
                known[name] = scores
        return [task for task in tasks if task.task_name not in known]

    language_model: HFLM | None = None
    for num_fewshot, tasks in by_fewshot.items():
        unfinished = cache.unfinished({**how, "num_fewshot": num_fewshot})
        with cache.alone(unfinished) if look(tasks) and state.is_main_process else nullcontext():
            # The first process decides what is missing: a file may come, from another run, while they look
            (missing,) = broadcast_object_list([[task.task_name for task in look(tasks)]])
            if not missing:
                continue
            if settings.dtype != "auto":  # which is as each model was saved
                _tell_of_other_types([identities[name] for name in missing], cache)
            if language_model is None:
                language_model = load_language_model(reference, settings)
                check_written((task for others in by_fewshot.values() for task in others), language_model)
            asked = [task for task in tasks if task.task_name in missing]
            for name, scores in evaluate_tasks(language_model, asked, num_fewshot, settings, unfinished).items():
                cache.put(identities[name], scores)
                known[name] = scores
            if state.is_main_process:  # which has written the scores
                cache.forget(unfinished)
    return {name: known[name] for name in identities if name in known}


def score_identities(
    reference: ModelReference, entries: Iterable[TaskEntry], settings: EvaluationSettings
) -> dict[str, dict[str, Any]]:
    """Returns by task what decides a model's scores, and names them in the cache."""
    how = {"model": reference.fingerprint(), **settings_identity(settings)}
    return _identities(how, _by_fewshot(entries, settings), settings)


def answer_seconds(
    reference: ModelReference, entries: Iterable[TaskEntry], settings: EvaluationSettings
) -> tuple[float, float]:
    """Measures how long a model takes on tasks; nothing is looked up in a cache, and nothing kept.

    Returns:
        Seconds of loading it, and of answering.
    """
    start = time.monotonic()
    language_model = load_language_model(reference, settings)
    loaded = time.monotonic()
    for num_fewshot, tasks in _by_fewshot(entries, settings).items():
        evaluate_tasks(language_model, tasks, num_fewshot, settings)
    return loaded - start, time.monotonic() - loaded


def _by_fewshot(entries: Iterable[TaskEntry], settings: EvaluationSettings) -> dict[int | None, list[Task]]:
    """The tasks by the number of examples that is asked for."""
    found: dict[int | None, list[Task]] = {}
    for entry in entries:
        num_fewshot = settings.num_fewshot if settings.num_fewshot is not None else entry.num_fewshot
        found.setdefault(num_fewshot, []).extend(entry.tasks)
    return found


def _identities(
    how: Mapping[str, Any], by_fewshot: Mapping[int | None, Sequence[Task]], settings: EvaluationSettings
) -> dict[str, dict[str, Any]]:
    return {
        task.task_name: {**how, **task_identity(task, num_fewshot, settings)}
        for num_fewshot, tasks in by_fewshot.items()
        for task in tasks
    }


def evaluate_tasks(
    language_model: HFLM,
    tasks: Sequence[Task],
    num_fewshot: int | None,
    settings: EvaluationSettings,
    unfinished: Path | None = None,
) -> dict[str, TaskScores]:
    """Scores a loaded model on tasks.

    Args:
        language_model: The model, wrapped for lm-eval.
        tasks: The tasks.
        num_fewshot: Examples in the prompt; `None` for each task's own number.
        settings: How to measure.
        unfinished: Beginning of the path of a file that keeps single answers, so that a killed run goes on in the
            middle of a task.

    Returns:
        The scores by task; none on other processes than the first.

    Raises:
        ValueError: If answers do not fit into the model, a task's template asks for what a sample does not have, or a
            task's scoring needs data of NLTK that are not there.
        OSError: If there is no room for single answers, those that are kept stay; or if their file is damaged.
    """
    check_written(tasks, language_model)
    indices = {task.task_name: settings.indices(task) for task in tasks}
    own_fewshot = [task.get_config("num_fewshot") for task in tasks]
    try:
        with infinite_perplexities(tasks):
            results = lm_eval.evaluate(
                _keeping_answers(language_model, unfinished),
                _prepared(tasks, num_fewshot),
                samples={name: chosen for name, chosen in indices.items() if chosen is not None} or None,
                bootstrap_iters=0,
                apply_chat_template=settings.apply_chat_template,
            )
    except TemplateError as error:
        raise ValueError(
            f"a template of {listed(list(indices))} cannot be filled in for every sample: {error}; correct it in the "
            "task's file, or leave such samples out."
        ) from error
    except LookupError as error:
        missing = NLTK_RESOURCE.search(str(error))
        if missing is None:
            raise
        raise ValueError(
            f"scoring needs NLTK's {missing[1]}, which is not here; run `python -m nltk.downloader {missing[1]}` with "
            "a network, and then this again."
        ) from error
    except sqlite3.DatabaseError as error:
        if "full" in str(error):
            raise OSError(errno.ENOSPC, f"single answers cannot be kept: {error}", str(unfinished)) from error
        remedy = "if the file is damaged, delete it; its answers will be asked again"
        file = f"{unfinished}_rank{PartialState().process_index}.json.db"
        raise OSError(errno.EIO, f"single answers cannot be kept: {error}; {remedy}", file) from error
    finally:
        for task, number in zip(tasks, own_fewshot, strict=True):  # lm-eval leaves its number in the task
            task.set_config("num_fewshot", number)
    if results is None:
        return {}
    return {task.task_name: TaskScores.from_lm_eval(task, results) for task in tasks}


def _prepared(tasks: Sequence[Task], num_fewshot: int | None) -> Any:
    """Seeds and tasks as `lm_eval.simple_evaluate` sets them.

    That function also asks git, which prints an error where there is no repository, and for the whole environment,
    which takes seconds; neither is used here.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        task.set_config("num_fewshot", effective_fewshot(task, num_fewshot))
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return TaskManager(include_defaults=False).load(list(tasks))


def _keeping_answers(language_model: HFLM, unfinished: Path | None) -> Any:
    """The model, or one that looks first whether it has answered before."""
    if unfinished is None:
        return language_model
    return KeptAnswers(language_model, unfinished, PartialState().process_index)


def _tell_of_other_types(identities: Sequence[Mapping[str, Any]], cache: ScoreCache) -> None:
    """Says that scores in another type are known, which are never put beside those of this one."""
    wanted = identities[0]["dtype"]
    for dtype in {"float32", "bfloat16", "float16"} - {wanted}:
        if any(cache.path({**identity, "dtype": dtype}).is_file() for identity in identities):
            logger.warning_once(  # not for every model
                "%s has scores in %s, which are left aside: these are in %s, for all models; dtype=%r would go on "
                "with them.",
                str(cache.folder),
                dtype,
                wanted,
                dtype,
            )


class _LanguageModel(HFLM):
    """lm-eval's model, which says what its requests cost.

    No process waits for the others' texts, of which a run that goes on may have none left.
    """

    _world_size: int

    def __init__(self, reference: ModelReference, **options: Any) -> None:
        loader = _WholeModels(reference)
        self.AUTO_MODEL_CLASS: Any = loader
        super().__init__(**options)
        self.AUTO_MODEL_CLASS = loader.auto_class  # which lm-eval asks for again

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores continuations."""
        with told_cost(self, requests):
            return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Writes answers."""
        with told_cost(self, requests):
            return super().generate_until(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores this process's own texts; lm-eval evens their number out for sharded models, which ours are not."""
        with told_cost(self, requests):
            world_size, self._world_size = self._world_size, 1
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self._world_size = world_size


class _WholeModels:
    """What lm-eval loads a model with in place of transformers' class, so that no weight is drawn anew.

    Args:
        reference: The model.
    """

    def __init__(self, reference: ModelReference) -> None:
        self.reference = reference
        self.auto_class = auto_class_of(AutoConfig.from_pretrained(reference.base, revision=reference.revision))

    def from_pretrained(self, source: str, **options: Any) -> PreTrainedModel:
        """Loads the model, which `source` names too."""
        return load_full(self.reference, self.auto_class, **options)
