"""Tasks that measure retention: named suites, and any of lm-eval's or of the user's."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from tqdm.auto import tqdm

from lopt_hf.common.settings import nearest
from lopt_hf.common.upstream.lm_eval import filter_names

__all__ = ["SUITES", "SuiteTask", "TaskEntry", "load_entries"]

OFFLINE_TASKS = Path(__file__).parent / "tasks"
# Of the network and the data, and of mistakes in a user's own task files
LOADING_ERRORS = (OSError, ImportError, DatasetsError, AttributeError, KeyError, TypeError, ValueError)


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
        ValueError: If a name is unknown, a folder does not exist, or a task's data cannot be loaded.
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
    """Loads tasks one by one; the progress bar names the one whose data are being read."""
    manager = TaskManager(include_path=folders, include_defaults=False)
    if any(task.name not in manager.task_index for task in wanted):
        progress.set_description("lm-eval's list of tasks")  # which takes some ten seconds
        manager = TaskManager(include_path=folders)
    entries: list[TaskEntry] = []
    for task in wanted:
        if task.name not in manager.task_index:
            found = nearest(task.name, manager.all_tasks, count=3)
            hint = f"; nearest are {', '.join(found)}" if found else ""
            raise ValueError(f"task {task.name!r} is unknown{hint}. `lm-eval ls tasks` lists lm-eval's own.")
        progress.set_description(f"data of {task.name}")
        entries += _entries_of(task, manager)
        progress.update()
    progress.set_description("tasks")
    return entries


def _entries_of(wanted: SuiteTask, manager: TaskManager) -> list[TaskEntry]:
    try:
        loaded = manager.load([wanted.name])
    except LOADING_ERRORS as error:
        raise ValueError(
            f"task {wanted.name!r} cannot be loaded: {type(error).__name__}: {error}. Check the network, or the files "
            "and packages that the task needs; the suite `offline` needs neither."
        ) from error
    how = (wanted.num_fewshot, wanted.main_metric)
    group = loaded.get("groups", {}).get(wanted.name)
    if group is not None and group.has_aggregation:
        return [TaskEntry(wanted.name, tuple(group.get_all_tasks()), *how, _group_metrics(group))]
    return [TaskEntry(task.task_name, (task,), *how) for task in loaded["tasks"].values()]


def _group_metrics(group: Group) -> dict[str, bool]:
    filters = dict.fromkeys(name for task in group.get_all_tasks() for name in filter_names(task))
    return {
        f"{metric.metric},{name}": metric.weight_by_size
        for metric in group.aggregate_metric_list or ()
        for name in metric.filter_list or filters
    }
