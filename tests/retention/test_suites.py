"""Suites name tasks and metrics that there are; what cannot be loaded is one clear error."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from lopt_hf.retention import suites
from lopt_hf.retention.suites import SUITES, SuiteTask, load_entries
from tests.retention.benchmark_tasks import write_benchmark_tasks


@pytest.fixture(scope="module")
def lm_evals_tasks() -> TaskManager:
    """The index of lm-eval's own tasks, which takes some seconds to make."""
    return TaskManager()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_benchmark_tasks(tmp_path / "tasks")


def configurations(name: str, manager: TaskManager) -> Iterator[dict[str, Any]]:
    """Those of a task, or of all tasks of a group, from the files alone."""
    entry = manager.task_index[name]
    if entry.kind is Kind.TASK:
        assert entry.cfg is not None
        yield entry.cfg
    members = entry.tags if entry.kind is Kind.TAG else (entry.cfg or {}).get("task", [])
    for member in members if entry.kind is not Kind.TASK else []:
        yield from configurations(member, manager)


@pytest.mark.parametrize("task", SUITES["paper"], ids=lambda task: task.name)
def test_the_papers_tasks_and_metrics_are_lm_evals(task: SuiteTask, lm_evals_tasks: TaskManager) -> None:
    """And a task that says 0-shot itself, which lm-eval does not let anybody change, is 0-shot in the suite."""
    assert task.main_metric is not None
    metric, _, of_filter = task.main_metric.partition(",")
    found = list(configurations(task.name, lm_evals_tasks))
    assert len(found) == (57 if task.name == "mmlu" else 1)
    for config in found:
        metrics = {entry["metric"]: entry for entry in config["metric_list"]}
        assert metrics[metric]["higher_is_better"] is True
        assert metrics[metric]["aggregation"] == "mean"
        assert of_filter in [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]]
        assert task.num_fewshot == 0 or config.get("num_fewshot") != 0


def test_mmlu_is_aggregated_by_size(lm_evals_tasks: TaskManager) -> None:
    config = lm_evals_tasks.task_index["mmlu"].cfg
    assert config is not None
    assert config["aggregate_metric_list"] == [{"metric": "acc", "weight_by_size": True}]


def test_the_offline_suite_loads() -> None:
    entries = load_entries(SUITES["offline"])
    parts = ("knowledge", "language", "numbers", "words", "code", "world", "prose")
    assert [entry.name for entry in entries] == [f"offline_{part}" for part in parts]
    assert sum(len(entry.tasks[0].eval_docs) for entry in entries[:-1]) > 4000


def test_unknown_task_of_lm_evals(lm_evals_tasks: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest names are offered; lm-eval's own tasks are looked through only for what is not nearer."""
    made: list[bool] = []

    def manager(include_path: Any, include_defaults: bool = True) -> TaskManager:
        made.append(include_defaults)
        return lm_evals_tasks if include_defaults else TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(suites, "TaskManager", manager)
    load_entries([SuiteTask("offline_knowledge")])
    assert made == [False]
    with pytest.raises(ValueError, match="task 'arc_esy' is unknown; nearest are arc_easy.*lm-eval ls tasks"):
        load_entries([SuiteTask("arc_esy")])
    assert made == [False, False, True]


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves lm-eval's tasks out, which nothing here is about."""
    monkeypatch.setattr(
        suites,
        "TaskManager",
        lambda include_path, include_defaults=True: TaskManager(include_path=include_path, include_defaults=False),
    )


def test_groups_and_tags(tasks: Path, own_tasks_only: None) -> None:
    """A group with an aggregation is one entry; without one, and tags, become their tasks."""
    (tasks / "loose.yaml").write_text("group: loose\ntask: [texts, endings]\n")
    text = (tasks / "sums.yaml").read_text()
    (tasks / "sums.yaml").write_text(f"tag: [numbers]\n{text}")
    (even,) = load_entries([SuiteTask("even", 2, "acc,none")], [tasks])
    assert (even.name, even.num_fewshot, even.main_metric) == ("even", 2, "acc,none")
    assert [task.task_name for task in even.tasks] == ["sums", "words"]
    assert even.group_metrics == {"acc,none": False, "acc_norm,none": False}
    (by_filter,) = load_entries([SuiteTask("by_filter")], [tasks])
    assert by_filter.group_metrics == {"exact_match,strict-match": True, "exact_match,flexible-extract": True}
    loose = load_entries([SuiteTask("loose", 1), SuiteTask("numbers")], [tasks])
    assert [(entry.name, entry.num_fewshot) for entry in loose] == [("texts", 1), ("endings", 1), ("sums", None)]
    assert all(not entry.group_metrics for entry in loose)


def no_data(tasks: Path) -> None:
    (tasks / "sums.jsonl").unlink()


def broken_data(tasks: Path) -> None:
    (tasks / "sums.jsonl").write_text('{"question": \n')


def unknown_key(tasks: Path) -> None:
    edit(tasks / "sums.yaml", "test_split", "num_shots: 1\ntest_split")


def unknown_function(tasks: Path) -> None:
    edit(tasks / "aggregations.py", "def square_of_mean", "def mean_squared")


def unknown_split(tasks: Path) -> None:
    edit(tasks / "sums.yaml", "test_split: test", "test_split: validation")


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (no_data, "FileNotFoundError: .*sums.jsonl"),
        (broken_data, "DatasetGenerationError"),
        (unknown_key, "TypeError: .*num_shots"),
        (unknown_function, "AttributeError: .*square_of_mean"),
        (unknown_split, "KeyError: .*validation"),
    ],
)
def test_tasks_that_cannot_be_loaded(
    tasks: Path, own_tasks_only: None, harm: Callable[[Path], None], reason: str
) -> None:
    harm(tasks)
    with pytest.raises(ValueError, match=f"(?s)task 'sums' cannot be loaded: {reason}.* Check the network, or the"):
        load_entries([SuiteTask("sums")], [tasks])


def test_data_that_need_a_script(tasks: Path, own_tasks_only: None) -> None:
    (tasks / "rows").mkdir()
    (tasks / "rows" / "rows.py").touch()
    edit(tasks / "sums.yaml", "dataset_path: json", f"dataset_path: {tasks / 'rows'}")
    with pytest.raises(ValueError, match="task 'sums' has data that only a script of theirs can read.*; leave it out"):
        load_entries([SuiteTask("sums")], [tasks])


def test_an_error_in_a_program_keeps_its_trace(
    tasks: Path, own_tasks_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("of a tensor's shape")

    monkeypatch.setattr(TaskManager, "load", broken)
    with pytest.raises(RuntimeError, match="of a tensor's shape"):
        load_entries([SuiteTask("sums")], [tasks])


UNSAFE = {
    "alone": ("unsafe_code: true", "sums"),
    "in a group": ("unsafe_code: true", "even"),
    "by a tag": ("unsafe_code: true\ntag: [numbers]", "numbers"),
    "in a group in a group": ("unsafe_code: true", "outer"),
    "by a group": ("", "running"),
}


@pytest.mark.parametrize(("added", "asked"), UNSAFE.values(), ids=UNSAFE)
def test_a_task_that_runs_a_models_code(tasks: Path, own_tasks_only: None, added: str, asked: str) -> None:
    """It is refused before any data are read, which here are not there."""
    (tasks / "sums.yaml").write_text(f"{(tasks / 'sums.yaml').read_text()}{added}\n")
    (tasks / "outer.yaml").write_text("group: outer\ntask: [{group: inner, task: even}]\n")
    (tasks / "running.yaml").write_text("group: running\ntask: [{task: sums, unsafe_code: true}]\n")
    no_data(tasks)
    (tasks / "words.jsonl").unlink()
    message = "task 'sums' runs code that the model writes, which is not done here; leave it out, or .*`lm-eval run"
    with pytest.raises(ValueError, match=message):
        load_entries([SuiteTask("words"), SuiteTask(asked)], [tasks])


def test_a_class_that_runs_a_models_code(tasks: Path, own_tasks_only: None) -> None:
    (tasks / "running.py").write_text(
        "from lm_eval.api.task import ConfigurableTask\n\n"
        "class Running(ConfigurableTask):\n    UNSAFE_CODE = True\n\n    def __init__(self, config):\n"
        "        super().__init__(config={k: v for k, v in config.items() if k != 'class'})\n"
    )
    edit(tasks / "sums.yaml", "task: sums", "task: sums\ngroup: any\nclass: !function running.Running")
    with pytest.raises(ValueError, match="task 'sums' runs code that the model writes"):
        load_entries([SuiteTask("sums")], [tasks])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "tasks is empty; name at least one, or a suite"),
        (["sums", "sums"], "task 'sums' is asked for twice"),
        (["words", "even"], "task 'words' is asked for twice, alone or in a group"),
        (["wrods"], "task 'wrods' is unknown; nearest are words"),
    ],
)
def test_names(tasks: Path, own_tasks_only: None, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_entries([SuiteTask(name) for name in names], [tasks])


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="include_path=.*nowhere is not a folder; name one that holds lm-eval task"):
        load_entries([SuiteTask("sums")], [tmp_path / "nowhere"])
