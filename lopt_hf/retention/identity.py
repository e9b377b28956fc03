"""What scores depend on: the keys of the cache, by which none is taken for those of other questions or settings."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable
from typing import Any

import lm_eval
import torch
import transformers
from accelerate import PartialState
from lm_eval.api.task import Task

from lopt_hf.retention.evaluation_settings import EvaluationSettings
from lopt_hf.retention.own_code import own_code

__all__ = ["SOFTMAX_DTYPE", "VERSIONS", "effective_fewshot", "settings_identity", "task_identity"]

# lm-eval adds log-likelihoods up in the logits' type, and bf16 rounds a text's sum of 2,000 nats to a multiple of 8
SOFTMAX_DTYPE = "float32"
VERSIONS = {module.__name__: module.__version__ for module in (lm_eval, transformers, torch)}


def settings_identity(settings: EvaluationSettings) -> dict[str, Any]:
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
        "num_fewshot": effective_fewshot(task, num_fewshot),
    }
    if (code := own_code(task)) is not None:
        identity["code"] = code
    if identity["num_fewshot"] > 0:  # each process draws its own examples, one sample after the other
        identity["examples"] = _digest_of(task.fewshot_docs())
        identity["processes"] = PartialState().num_processes
    return identity


def effective_fewshot(task: Task, num_fewshot: int | None) -> int:
    """The number of examples that lm-eval will put into the prompt: a task's own 0 cannot be changed.

    Whole texts have no prompt, whatever their task says.
    """
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return 0
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
