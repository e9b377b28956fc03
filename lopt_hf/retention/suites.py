"""Tasks that measure retention: named suites, and any of lm-eval's or of the user's."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from tqdm.auto import tqdm

from lopt_hf.common.settings import nearest
from lopt_hf.common.upstream.lm_eval import filter_names

__all__ = ["SUITES", "SuiteTask", "TaskEntry", "load_entries"]

OFFLINE_TASKS = Path(__file__).parent / "tasks"
# Of the network and the data, and of mistakes in a user's own task files
LOADING_ERRORS = (
    *(OSError, ImportError, DatasetsError, TemplateError),
    *(AttributeError, KeyError, IndexError, TypeError, ValueError),
)
NO_ROWS = "out of bounds for size 0"  # how an IndexError of datasets says that there is no first sample
NO_SCRIPTS = "Dataset scripts are no longer supported"  # how a RuntimeError of datasets begins, which has no class


@dataclass(frozen=True)
class SuiteTask:
    """A task as a suite runs it.

    Parameters:
        name: lm-eval's task or group.
        num_fewshot: Examples in the prompt; `None` for the task's own number.
        main_metric: `metric,filter` that stands for the task in means and plots; `None` for the task's first.
    """

    name: str
    num_fewshot: int | None = None
    main_metric: str | None = None


SUITES: Mapping[str, tuple[SuiteTask, ...]] = {
    # LoPT, arXiv 2605.04913 v3: the seven tasks of its SFT tables with their shots and metrics
    "paper": (
        SuiteTask("mmlu", 5, "acc,none"),
        SuiteTask("ifeval", 0, "prompt_level_strict_acc,none"),
        SuiteTask("arc_challenge", 25, "acc_norm,none"),
        SuiteTask("gsm8k", 4, "exact_match,strict-match"),
        SuiteTask("hellaswag", 5, "acc_norm,none"),
        SuiteTask("truthfulqa_mc2", 0, "acc,none"),
        SuiteTask("winogrande", 5, "acc,none"),
    ),
    # Answers that are written, not chosen; lm-eval's own shots for GSM8K are five, LoPT's four
    "generation": (
        SuiteTask("gsm8k", 4, "exact_match,strict-match"),
        SuiteTask("ifeval", 0, "prompt_level_strict_acc,none"),
    ),
    # In the package: no hub, no file from elsewhere
    "offline": tuple(
        SuiteTask(f"offline_{part}")
        for part in ("knowledge", "language", "numbers", "words", "code", "world", "prose")
    ),
}


@dataclass(frozen=True)
class TaskEntry:
    """One entry of the benchmark: a task, or a group that is aggregated into one figure.

    Parameters:
        name: lm-eval's name.
        tasks: The task itself, or all tasks of the group.
        num_fewshot: As in `SuiteTask`.
        main_metric: As in `SuiteTask`.
        group_metrics: For a group, its aggregated metrics, and whether its tasks are weighted by their size.
    """

    name: str
    tasks: tuple[Task, ...]
    num_fewshot: int | None = None
    main_metric: str | None = None
    group_metrics: Mapping[str, bool] = field(default_factory=dict)


def load_entries(
    wanted: Sequence[SuiteTask], include_path: Sequence[Path] = (), shows_progress: bool = False
) -> list[TaskEntry]:
    """Loads tasks by name; groups without an aggregation of their own, and tags, become their tasks.

    Args:
        wanted: Tasks, groups or tags.
        include_path: Folders with further tasks; their names win over lm-eval's.
        shows_progress: Whether a progress bar says which task's data are being read, which may be a download.

    Raises:
        ValueError: If a name is unknown, a folder does not exist, a task runs what a model writes, or its data cannot
            be loaded.
    """
    if not wanted:
        raise ValueError("tasks is empty; name at least one, or a suite.")
    for folder in include_path:
        if not folder.is_dir():
            raise ValueError(f"include_path={folder} is not a folder; name one that holds lm-eval task files.")
    with tqdm(total=len(wanted), desc="tasks", unit="task", disable=not shows_progress) as progress:
        entries = _loaded(wanted, [OFFLINE_TASKS, *include_path], progress)
    counts = Counter(member.task_name for entry in entries for member in entry.tasks)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"task {name!r} is asked for twice, alone or in a group; name it once.")
    return entries


def _loaded(wanted: Sequence[SuiteTask], folders: list[str | Path], progress: "tqdm[NoReturn]") -> list[TaskEntry]:
    """Loads tasks one by one, after their names are checked; the progress bar names the one whose data are read."""
    manager = TaskManager(include_path=folders, include_defaults=False)
    if any(task.name not in manager.task_index for task in wanted):
        progress.set_description("lm-eval's list of tasks")  # which takes some ten seconds
        manager = TaskManager(include_path=folders)
    for task in wanted:
        _check(task.name, manager)
    entries: list[TaskEntry] = []
    for task in wanted:
        progress.set_description(f"data of {task.name}")
        entries += _entries_of(task, manager)
        progress.update()
    progress.set_description("tasks")
    return entries


def _check(name: str, manager: TaskManager) -> None:
    """Checks by the files alone that a task, group or tag is known, and can be measured here."""
    if name not in manager.task_index:
        found = nearest(name, manager.all_tasks, count=3)
        hint = f"; nearest are {', '.join(found)}" if found else ""
        raise ValueError(f"task {name!r} is unknown{hint}. `lm-eval ls tasks` lists lm-eval's own.")
    if (with_code := next(_with_code(name, manager), None)) is not None:
        raise _code_error(with_code)


def _with_code(member: Any, manager: TaskManager) -> Iterator[str]:
    """The tasks behind a name, or a member of a group, whose files say that they run what a model writes."""
    config: Mapping[str, Any] = member if isinstance(member, Mapping) else {}
    name = str(config.get("group") or config.get("task") or member)
    entry = manager.task_index.get(name)
    if entry is not None and entry.cfg is None:  # a tag
        config = {"group": name, "task": sorted(entry.tags)}
    elif entry is not None:
        config = {**entry.cfg, **config}
    if config.get("unsafe_code"):
        yield name
    is_group = "group" in config and "class" not in config  # a task that is a class may name the group that it is in
    members = config.get("task") or [] if is_group else []
    for each in [members] if isinstance(members, str) else members:
        yield from _with_code(each, manager)


def _code_error(name: str) -> ValueError:
    return ValueError(
        f"task {name!r} runs code that the model writes, which is not done here; leave it out, or measure it with "
        "lm-eval itself, in a sandbox: `lm-eval run --confirm_run_unsafe_code`."
    )


def _entries_of(wanted: SuiteTask, manager: TaskManager) -> list[TaskEntry]:
    try:
        loaded = manager.load([wanted.name])
    except LOADING_ERRORS as error:
        raise ValueError(
            f"task {wanted.name!r} cannot be loaded: {_reason(error)}. Check the network, or the files and packages "
            "that the task needs; the suite `offline` needs neither."
        ) from error
    except RuntimeError as error:
        if not str(error).startswith(NO_SCRIPTS):
            raise
        raise ValueError(
            f"task {wanted.name!r} has data that only a script of theirs can read, and datasets runs none any more; "
            "leave it out, or write a task file that reads them from JSON or Parquet files, for --include-path."
        ) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):  # as a class may say, whose file does not
            raise _code_error(task.task_name)
    how = (wanted.num_fewshot, wanted.main_metric)
    group = loaded.get("groups", {}).get(wanted.name)
    if group is not None and group.has_aggregation:
        return [TaskEntry(wanted.name, tuple(group.get_all_tasks()), *how, _group_metrics(group))]
    return [TaskEntry(task.task_name, (task,), *how) for task in loaded["tasks"].values()]


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    is_empty = isinstance(error, IndexError) and NO_ROWS in str(error)
    return f"it has no samples, as where its process_docs leaves none ({text})" if is_empty else text


def _group_metrics(group: Group) -> dict[str, bool]:
    filters = dict.fromkeys(name for task in group.get_all_tasks() for name in filter_names(task))
    return {
        f"{metric.metric},{name}": metric.weight_by_size
        for metric in group.aggregate_metric_list or ()
        for name in metric.filter_list or filters
    }
