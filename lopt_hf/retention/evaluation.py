"""Evaluation of a model on tasks with lm-eval, once for each model, task and setting."""

import errno
import hashlib
import inspect
import json
import random
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers.utils import logging

from lopt_hf.common.arithmetic import read_dtype
from lopt_hf.common.settings import check_at_least, option
from lopt_hf.common.upstream.lm_eval import set_model, set_process
from lopt_hf.retention.answers import KeptAnswers
from lopt_hf.retention.cost import told_cost
from lopt_hf.retention.heldout import HELDOUT_TASK
from lopt_hf.retention.lengths import check_written
from lopt_hf.retention.own_code import own_code
from lopt_hf.retention.references import ModelReference, load_tokenizer
from lopt_hf.retention.scores import ScoreCache, TaskScores, infinite_perplexities
from lopt_hf.retention.suites import TaskEntry

__all__ = [
    "SOFTMAX_DTYPE",
    "VERSIONS",
    "EvaluationSettings",
    "evaluate_tasks",
    "task_identity",
    "load_language_model",
    "evaluate_model",
]

logger = logging.get_logger(__name__)

# lm-eval adds log-likelihoods up in the logits' type, and bf16 rounds a text's sum of 2,000 nats to a multiple of 8
SOFTMAX_DTYPE = "float32"
# How an error of NLTK, which is a plain LookupError, says what is missing
NLTK_RESOURCE = re.compile(r"nltk\.download\('(\w+)'\)")
VERSIONS = {module.__name__: module.__version__ for module in (lm_eval, transformers, torch)}


@dataclass(frozen=True)
class EvaluationSettings:
    """How every model is evaluated.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    limit: int | None = option(None, "First samples of each task. Default: all.")
    samples: Mapping[str, int | Sequence[int]] = option(
        {}, "Task -> how many of its first samples, or which by number; wins over limit."
    )
    num_fewshot: int | None = option(None, "Examples in each prompt. Default: the suite's or the task's own number.")
    batch_size: int = option(8, "Requests per forward on each device.")
    dtype: str = option(
        "auto",
        "All models' weights when measuring: float32, bfloat16, float16, or auto: as the baseline was saved, but "
        "float32 where this machine is slower in bfloat16.",
    )
    apply_chat_template: bool = option(False, "Put prompts into the model's chat template.")
    max_length: int | None = option(None, "Longest input in tokens. Default: the model's.")

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_length"):
            check_at_least(name, getattr(self, name), 1, "leaves nothing to measure")
        check_at_least("num_fewshot", self.num_fewshot, 0, "is negative")
        if self.dtype != "float16":
            object.__setattr__(self, "dtype", read_dtype(self.dtype, "auto, float32, bfloat16 or float16"))
        for task, chosen in self.samples.items():
            if (chosen < 1) if isinstance(chosen, int) else (not chosen or min(chosen) < 0):
                raise ValueError(f"samples of {task!r} are {chosen}; give how many (1 or more) or a list of numbers.")

    def indices(self, task: Task) -> list[int] | None:
        """The numbers of a task's samples that are measured; `None` for all.

        Raises:
            ValueError: If a sample is asked for that the task does not have.
        """
        if task.task_name == HELDOUT_TASK:  # has a number of its own
            return None
        chosen = self.samples.get(task.task_name, self.limit)
        if chosen is None:
            return None
        available = len(task.eval_docs)
        if isinstance(chosen, int):
            return list(range(min(chosen, available)))
        if max(chosen) >= available:
            raise ValueError(
                f"samples of {task.task_name!r} name number {max(chosen)}, but it has {available}, counted from 0."
            )
        return sorted(set(chosen))  # in lm-eval's order, whose sample numbers are right for sorted lists only


def load_language_model(reference: ModelReference, settings: EvaluationSettings) -> HFLM:
    """Loads a model for lm-eval, on one device or on those of `accelerate launch`."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = _LanguageModel(
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
        adapted = PeftModel.from_pretrained(model.model, reference.adapter, revision=reference.adapter_revision)
        set_model(model, adapted.eval())
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
    how = {"model": reference.fingerprint(), **_settings_identity(settings)}
    by_fewshot: dict[int | None, list[Task]] = {}
    for entry in entries:
        num_fewshot = settings.num_fewshot if settings.num_fewshot is not None else entry.num_fewshot
        by_fewshot.setdefault(num_fewshot, []).extend(entry.tasks)
    identities = {
        task.task_name: {**how, **task_identity(task, num_fewshot, settings)}
        for num_fewshot, tasks in by_fewshot.items()
        for task in tasks
    }
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
        ValueError: If answers do not fit into the model, or a task's scoring needs data of NLTK that are not there.
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
        task.set_config("num_fewshot", _effective_fewshot(task, num_fewshot))
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


def _settings_identity(settings: EvaluationSettings) -> dict[str, Any]:
    """Returns the settings and versions that influence a model's scores."""
    used = ("batch_size", "dtype", "apply_chat_template", "max_length")
    return {**{name: getattr(settings, name) for name in used}, "softmax_dtype": SOFTMAX_DTYPE, **VERSIONS}


def task_identity(task: Task, num_fewshot: int | None, settings: EvaluationSettings) -> dict[str, Any]:
    """Returns what identifies a task's questions: its configuration, its samples, and the source of its examples.

    Of a user's own task also the files of its code: those that it calls are not in the configuration.
    """
    indices = settings.indices(task)
    documents = task.eval_docs
    chosen = range(len(documents)) if indices is None else indices
    identity = {
        "task": task.task_name,
        "task_config": _config_text(task),
        "indices": list(chosen),
        "documents": _digest_of(documents[index] for index in chosen),
        "num_fewshot": _effective_fewshot(task, num_fewshot),
    }
    if (code := own_code(task)) is not None:
        identity["code"] = code
    if identity["num_fewshot"] > 0:  # each process draws its own examples, one sample after the other
        identity["examples"] = _digest_of(task.fewshot_docs())
        identity["processes"] = PartialState().num_processes
    return identity


def _effective_fewshot(task: Task, num_fewshot: int | None) -> int:
    """The number of examples that lm-eval will put into the prompt: a task's own 0 cannot be changed."""
    own = task.get_config("num_fewshot")
    return (own or 0) if num_fewshot is None or own == 0 else num_fewshot


def _digest_of(documents: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _config_text(task: Task) -> str:
    """The task's configuration as text; without addresses of functions, and without where its file is.

    The former differ between runs, the latter between clones.
    """
    config = {name: value for name, value in task.dump_config().items() if name != "num_fewshot"}
    config["metadata"] = {k: value for k, value in (config.get("metadata") or {}).items() if k != "config_source"}
    text = json.dumps(config, sort_keys=True, default=_name)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _name(value: Any) -> str:
    """The name of a function or class; of anything else, such as a partial, its type's."""
    return value.__qualname__ if inspect.isroutine(value) or inspect.isclass(value) else type(value).__name__
