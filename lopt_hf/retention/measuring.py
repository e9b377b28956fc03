"""Scoring a model on tasks with lm-eval, each model, task and setting once."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from accelerate import PartialState
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lopt_hf.pretrained import resolve_model
from lopt_hf.retention.heldout import HELDOUT_TASK
from lopt_hf.retention.scores import ScoreCache, TaskScores, fingerprint
from lopt_hf.retention.suites import TaskEntry

__all__ = ["MeasuringSettings", "ModelReference", "evaluate_tasks", "load_tokenizer", "measure_model"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuringSettings:
    """How every model is measured.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    limit: int | None = field(default=None, metadata={"help": "First samples of each task. Default: all."})
    samples: Mapping[str, int | Sequence[int]] = field(
        default_factory=dict,
        metadata={"help": "Task -> how many of its first samples, or which by number; wins over limit."},
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples in each prompt. Default: the suite's or the task's own number."}
    )
    batch_size: int = field(default=8, metadata={"help": "Requests per forward on each device."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type when measuring; auto: as saved."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Put prompts into the model's chat template."})
    max_length: int | None = field(default=None, metadata={"help": "Longest input in tokens. Default: the model's."})

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} leaves nothing to measure; set it to 1 or more, or leave it out.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot={self.num_fewshot} is negative; set it to 0 or more.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; use auto, float32, bfloat16 or float16.")
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


@dataclass(frozen=True)
class ModelReference:
    """A model on disk or on the hub: a full checkpoint or a PEFT adapter.

    Parameters:
        name: As the user gave it.
        base: Hub id or folder of the full model.
        adapter: Folder or hub id of the adapter, if it is one.
        revision: Branch, tag or commit of a hub id.
    """

    name: str
    base: str
    adapter: str | None = None
    revision: str | None = None

    @classmethod
    def find(cls, name: str, revision: str | None = None) -> "ModelReference":
        """Tells a full model from an adapter.

        Raises:
            ValueError: If there is no such model.
        """
        source = resolve_model(name)
        config = _adapter_config(source, revision)
        if config is None:
            return cls(name, source, None, revision)
        return cls(name, resolve_model(str(config["base_model_name_or_path"])), source, revision)

    def fingerprint(self) -> str:
        """What tells it from every other model."""
        own = fingerprint(self.base, None if self.adapter else self.revision)
        return own if self.adapter is None else f"{own}+{fingerprint(self.adapter, self.revision)}"


def load_tokenizer(reference: ModelReference) -> PreTrainedTokenizerBase:
    """The tokenizer that goes with a model; an adapter's own where it has one."""
    folder = reference.adapter
    has_own = folder is not None and (Path(folder) / "tokenizer_config.json").is_file()
    source = folder if has_own and folder else reference.base
    return AutoTokenizer.from_pretrained(source, revision=reference.revision)


def load_language_model(reference: ModelReference, settings: MeasuringSettings) -> HFLM:
    """Loads a model for lm-eval, on one device or on those of `accelerate launch`."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = HFLM(
        pretrained=reference.base,
        peft=reference.adapter,
        revision=reference.revision or "main",
        dtype=settings.dtype,
        device=str(device),
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        tokenizer=load_tokenizer(reference),
    )
    state = PartialState()
    if state.num_processes > 1 and model.world_size == 1:  # lm-eval shares samples out among accelerators only
        model._rank, model._world_size = state.process_index, state.num_processes
    return model


def measure_model(
    reference: ModelReference, entries: Iterable[TaskEntry], settings: MeasuringSettings, cache: ScoreCache
) -> dict[str, TaskScores]:
    """Scores a model on every task; loads it only if something is not in the cache.

    Args:
        reference: The model.
        entries: The tasks.
        settings: How to measure.
        cache: Where finished scores are; each task is written as soon as it is done.

    Returns:
        Scores by task; on other processes than the first only what was in the cache.
    """
    how = {"model": reference.fingerprint(), **_identity_of_settings(settings)}
    by_fewshot: dict[int | None, list[Task]] = {}
    for entry in entries:
        num_fewshot = settings.num_fewshot if settings.num_fewshot is not None else entry.num_fewshot
        by_fewshot.setdefault(num_fewshot, []).extend(entry.tasks)
    identities = {
        task.task_name: {**how, **_identity_of_task(task, settings), "num_fewshot": num_fewshot}
        for num_fewshot, tasks in by_fewshot.items()
        for task in tasks
    }
    known = {name: cache.get(identity) for name, identity in identities.items()}
    PartialState().wait_for_everyone()  # nobody writes before all have looked
    language_model: HFLM | None = None
    for num_fewshot, tasks in by_fewshot.items():
        missing = [task for task in tasks if known[task.task_name] is None]
        if not missing:
            continue
        language_model = language_model or load_language_model(reference, settings)
        unfinished = cache.unfinished({**how, "num_fewshot": num_fewshot})
        for name, scores in evaluate_tasks(language_model, missing, num_fewshot, settings, unfinished).items():
            cache.put(identities[name], scores)
            known[name] = scores
        cache.forget(unfinished)
    return {name: scores for name, scores in known.items() if scores is not None}


def evaluate_tasks(
    language_model: HFLM,
    tasks: Sequence[Task],
    num_fewshot: int | None,
    settings: MeasuringSettings,
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
    """
    indices = {task.task_name: settings.indices(task) for task in tasks}
    results = lm_eval.simple_evaluate(
        model=language_model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        samples={name: chosen for name, chosen in indices.items() if chosen is not None} or None,
        bootstrap_iters=0,
        apply_chat_template=settings.apply_chat_template,
        task_manager=TaskManager(include_defaults=False),
        use_cache=None if unfinished is None else str(unfinished),
    )
    if results is None:
        return {}
    return {task.task_name: TaskScores.from_lm_eval(task, results) for task in tasks}


def _adapter_config(source: str, revision: str | None) -> Mapping[str, Any] | None:
    """The adapter's configuration, or `None` for a full model."""
    files = {
        name: transformers.utils.cached_file(
            source, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        for name in ("config.json", "adapter_config.json")
    }
    if files["config.json"] is None and files["adapter_config.json"] is not None:
        return json.loads(Path(files["adapter_config.json"]).read_text(encoding="utf-8"))
    if files["config.json"] is None:
        raise ValueError(
            f"model {source!r} has no config.json and no adapter_config.json; give a checkpoint's folder."
        )
    return None


def _identity_of_settings(settings: MeasuringSettings) -> dict[str, Any]:
    """What decides a model's scores besides the model and the task."""
    used = {"batch_size", "dtype", "apply_chat_template", "max_length"}
    return {
        **{name: value for name, value in asdict(settings).items() if name in used},
        "lm_eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _identity_of_task(task: Task, settings: MeasuringSettings) -> dict[str, Any]:
    """What is asked: the task's configuration and the very samples."""
    indices = settings.indices(task)
    documents = task.eval_docs
    chosen = range(len(documents)) if indices is None else indices
    digest = hashlib.sha256()
    for index in chosen:
        digest.update(json.dumps(documents[index], sort_keys=True, default=str).encode())
    return {
        "task": task.task_name,
        "task_config": _config_text(task),
        "indices": list(chosen),
        "documents": digest.hexdigest(),
    }


def _config_text(task: Task) -> str:
    """The task's configuration as text; functions by their name, since their address differs between runs."""
    config = {name: value for name, value in task.dump_config().items() if name != "num_fewshot"}
    return json.dumps(
        config, sort_keys=True, default=lambda value: getattr(value, "__qualname__", type(value).__name__)
    )
