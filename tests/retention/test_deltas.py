"""Changes of tasks and groups agree with lm-eval's own values, and the changed answers are the ones listed."""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from lopt_hf.retention.benchmark import flips
from lopt_hf.retention.deltas import MARGIN, entry_deltas, entry_metrics
from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_model
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.results import Delta
from lopt_hf.retention.scores import ScoreCache, TaskScores
from lopt_hf.retention.suites import SuiteTask, TaskEntry, load_entries
from tests.retention.benchmark_tasks import NUM_ROWS
from tests.retention.conftest import SavedModels

CONFIDENCE = 0.95


def groups_by_lm_eval(model: str, folder: Path, group: str) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model},
        tasks=[group],
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    assert results is not None
    return results["groups"][group]


def measured(model: str, entries: list[TaskEntry], cache: Path) -> dict[str, TaskScores]:
    return evaluate_model(ModelReference.find(model), entries, EvaluationSettings(), ScoreCache(cache))


def deltas_of(entry: TaskEntry, models: SavedModels, cache: Path) -> dict[str, Delta]:
    before, after = (measured(model, [entry], cache) for model in (models.base, models.tuned))
    return {delta.metric: delta for delta, _ in entry_deltas(entry, before, [after], CONFIDENCE, MARGIN)}


@pytest.mark.parametrize(
    ("group", "metrics", "size"),
    [
        ("even", {"acc": "acc,none", "acc_norm": "acc_norm,none"}, NUM_ROWS["sums"] + NUM_ROWS["words"]),
        ("sized", {"acc": "acc,none", "acc_norm": "acc_norm,none"}, NUM_ROWS["sums"] + NUM_ROWS["words"]),
        ("by_filter", {f"exact_match,{f}": f"exact_match,{f}" for f in ("strict-match", "flexible-extract")}, 9),
    ],
)
def test_groups_are_aggregated_as_lm_eval_does(
    models: SavedModels, task_folder: Path, tmp_path: Path, group: str, metrics: dict[str, str], size: int
) -> None:
    """With and without weights by size; where only some tasks have a metric; where filters are not named."""
    (entry,) = load_entries([SuiteTask(group)], [task_folder])
    deltas = deltas_of(entry, models, tmp_path)
    before, after = (groups_by_lm_eval(model, task_folder, group) for model in (models.base, models.tuned))
    assert deltas.keys() == metrics.keys()
    for name, lm_evals in metrics.items():
        delta = deltas[name]
        assert delta.task == group
        assert delta.baseline == pytest.approx(before[lm_evals], rel=1e-6)
        assert delta.value == pytest.approx(after[lm_evals], rel=1e-6)
        assert delta.delta == pytest.approx(delta.value - delta.baseline)
        assert delta.low <= delta.delta <= delta.high
    first = deltas[next(iter(metrics))]
    assert first.n == size
    assert first.baseline != first.value


def test_weights_by_size_matter(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    """The two groups of the same tasks differ, so the test above tells the one rule from the other."""
    even, sized = (
        deltas_of(load_entries([SuiteTask(group)], [task_folder])[0], models, tmp_path)["acc"]
        for group in ("even", "sized")
    )
    assert even.baseline != pytest.approx(sized.baseline, abs=1e-4)


def test_single_tasks(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    """Each metric's values are the two models' own; the main metric comes first."""
    entries = load_entries([SuiteTask("sums", None, "acc_norm,none"), SuiteTask("texts")], [task_folder])
    before, after = (measured(model, entries, tmp_path) for model in (models.base, models.tuned))
    assert entry_metrics(entries[0], before)[0] == "acc_norm,none"
    for entry in entries:
        for delta, _ in entry_deltas(entry, before, [after], CONFIDENCE, MARGIN):
            name = f"{delta.metric},none"
            assert delta.baseline == pytest.approx(before[entry.name].values[name], rel=1e-6)
            assert delta.value == pytest.approx(after[entry.name].values[name], rel=1e-6)
            assert delta.higher_is_better == before[entry.name].higher_is_better[name]


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("sums", "accuracy,none", "main metric 'accuracy,none' of 'sums' is none of acc,none, acc_norm,none"),
        ("even", "f1,none", "main metric 'f1,none' of 'even' is none of acc,none, acc_norm,none"),
    ],
)
def test_unknown_main_metric(
    models: SavedModels, task_folder: Path, tmp_path: Path, name: str, metric: str, message: str
) -> None:
    (entry,) = load_entries([SuiteTask(name, None, metric)], [task_folder])
    with pytest.raises(ValueError, match=message):
        entry_metrics(entry, measured(models.base, [entry], tmp_path))


def test_group_whose_tasks_lack_its_metrics(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    (found,) = load_entries([SuiteTask("even")], [task_folder])
    entry = TaskEntry("even", found.tasks, group_metrics={"f1,none": True})
    with pytest.raises(ValueError, match="no task of the group 'even' has its metrics f1,none"):
        entry_metrics(entry, measured(models.base, [entry], tmp_path))


def hand_made(task: str, **metrics: list[float]) -> TaskScores:
    """Scores of samples 10, 11, and so on."""
    number = len(next(iter(metrics.values())))
    responses = {"none": ["first"], "other": ["second"]}
    samples = [
        {"doc_id": 10 + i, "doc_hash": "", "doc": {"i": i}, "target": i, "responses": responses} for i in range(number)
    ]
    named = {name.replace("__", ","): values for name, values in metrics.items()}
    return TaskScores(task, "1", 0, named, {}, dict.fromkeys(named, True), samples)


def test_flips_are_the_answers_that_differ(task_folder: Path) -> None:
    """Their samples and directions, by hand; as many as the change counts; none of what is not right or wrong."""
    (entry,) = load_entries([SuiteTask("sums")], [task_folder])
    before = {"sums": hand_made("sums", acc__none=[1, 0, 1, 1, 0, 0.0], acc_norm__none=[0.5, 1, 0, 0, 1, 1])}
    after = {"sums": hand_made("sums", acc__none=[1, 1, 0, 1, 1, 1.0], acc_norm__none=[0.0, 0, 1, 0, 1, 1])}
    rows = list(flips("tuned", before, after))
    assert [(row["doc_id"], row["direction"]) for row in rows] == [
        (11, "wrong to right"),
        (12, "right to wrong"),
        (14, "wrong to right"),
        (15, "wrong to right"),
    ]
    first = {"model": "tuned", "task": "sums", "metric": "acc,none", "doc": {"i": 1}, "target": 1}
    assert first.items() <= rows[0].items()
    delta = entry_deltas(entry, before, [after], CONFIDENCE, MARGIN)[0][0]
    assert (delta.right_to_wrong, delta.wrong_to_right) == (1, 3)
    counts = [row["direction"] for row in rows]
    assert (counts.count("right to wrong"), counts.count("wrong to right")) == (1, 3)


def test_flips_show_the_responses_that_the_metric_judged() -> None:
    before = {"sums": hand_made("sums", exact_match__none=[1.0], exact_match__other=[0.0])}
    after = {"sums": hand_made("sums", exact_match__none=[0.0], exact_match__other=[1.0])}
    rows = list(flips("tuned", before, after))
    assert [(row["metric"], row["direction"], row["model_responses"], row["baseline_responses"]) for row in rows] == [
        ("exact_match,none", "right to wrong", ["first"], ["first"]),
        ("exact_match,other", "wrong to right", ["second"], ["second"]),
    ]


def test_flips_of_measured_models(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    """As many of each kind as the changes count, and only of tasks that are right or wrong."""
    entries = load_entries([SuiteTask(name) for name in ("sums", "texts", "generated")], [task_folder])
    before, after = (measured(model, entries, tmp_path) for model in (models.base, models.tuned))
    rows = list(flips("tuned", before, after))
    assert {row["task"] for row in rows} == {"sums", "generated"}
    for entry in entries:
        for delta, _ in entry_deltas(entry, before, [after], CONFIDENCE, MARGIN):
            if delta.right_to_wrong is None:
                continue
            names = (delta.metric, f"{delta.metric},none")
            chosen = [row["direction"] for row in rows if row["task"] == entry.name and row["metric"] in names]
            assert chosen.count("right to wrong") == delta.right_to_wrong
            assert chosen.count("wrong to right") == delta.wrong_to_right
            assert delta.delta == pytest.approx((delta.wrong_to_right - delta.right_to_wrong) / delta.n)
