"""Changes of tasks and groups agree with lm-eval's own values, and the changed answers are the ones listed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from lopt_hf.retention.benchmark import flips
from lopt_hf.retention.deltas import MARGIN, entry_deltas, entry_metrics, is_higher_better, mean_delta
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


@pytest.mark.parametrize(
    ("direction", "first", "counts"),
    [(True, "wrong to right", (1, 2)), (False, "right to wrong", (2, 1)), (None, "0 to 1", (None, None))],
)
def test_right_and_wrong_are_by_the_metrics_direction(
    task_folder: Path, direction: bool | None, first: str, counts: tuple[int | None, int | None]
) -> None:
    """Of `pct_stereotype`, where lower is better, a 1 is wrong; where nobody says, it is a 1."""
    (entry,) = load_entries([SuiteTask("sums")], [task_folder])
    named = {"acc,none": direction}
    values = [0, 1, 0, 1.0], [1, 0, 1, 1.0]
    before, after = ({"sums": replace(hand_made("sums", acc__none=each), higher_is_better=named)} for each in values)
    assert next(flips("tuned", before, after))["direction"] == first
    ((delta, _),) = entry_deltas(entry, before, [after], CONFIDENCE, MARGIN)
    assert (delta.right_to_wrong, delta.wrong_to_right) == counts
    assert delta.p_value == 1.0


def with_metric_on(doc_ids: Sequence[int], values: list[float], clusters: list[int] | None = None) -> dict[str, Any]:
    """Scores of samples 10 to 15, of which some have a metric `judged` too."""
    scores = hand_made("sums", acc__none=[1, 0, 1, 1, 0, 0.0])
    metrics = {**scores.metrics, "judged,none": values}
    directions = dict.fromkeys(metrics, True)
    on_some = {"judged,none": list(doc_ids)}
    return {"sums": replace(scores, metrics=metrics, higher_is_better=directions, doc_ids=on_some, clusters=clusters)}


def test_metrics_of_some_samples_are_paired_by_sample(task_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On those that both models have, of which one line tells; their clusters and flips are those samples' own."""
    (entry,) = load_entries([SuiteTask("sums")], [task_folder])
    clusters = [0, 0, 1, 1, 2, 2]
    before = with_metric_on([10, 12, 13, 15], [1, 0, 1, 0], clusters)
    after = with_metric_on([12, 13, 14, 15], [0, 0, 1, 0], clusters)
    everything = entry_deltas(entry, before, [after], CONFIDENCE, MARGIN)
    whole, judged = (delta for delta, _ in everything)
    assert (whole.n, whole.num_clusters, whole.delta) == (6, 3, 0)
    assert (judged.n, judged.num_clusters) == (3, 2)
    assert (judged.baseline, judged.value) == pytest.approx((1 / 3, 0))
    assert (judged.right_to_wrong, judged.wrong_to_right) == (1, 0)
    assert [(row["doc_id"], row["metric"]) for row in flips("tuned", before, after)] == [(13, "judged,none")]
    (message,) = {record.getMessage() for record in caplog.records}
    assert message == (
        "task sums: 2 of the models compared have judged on 4, 4 samples, and not all on the same: it is compared on "
        "the 3 that all have."
    )


@pytest.mark.parametrize("others", [[14, 15], []])
def test_a_metric_without_a_common_sample_is_left_out(
    task_folder: Path, caplog: pytest.LogCaptureFixture, others: list[int]
) -> None:
    (entry,) = load_entries([SuiteTask("sums")], [task_folder])
    before, after = with_metric_on([10, 12], [1.0, 0.0]), with_metric_on(others, [1.0] * len(others))
    if not others:
        after = {"sums": hand_made("sums", acc__none=[1, 0, 1, 1, 0, 0.0])}
    assert [delta.metric for delta, _ in entry_deltas(entry, before, [after], CONFIDENCE, MARGIN)] == ["acc"]
    assert not list(flips("tuned", before, after))
    (message,) = {record.getMessage() for record in caplog.records}
    assert (
        f"have judged on 2, {len(others)} samples, and not all on the same: none is common, so it is left" in message
    )


def test_a_metric_without_a_direction_is_neither_better_nor_worse(
    task_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line names task and metric; it is in no mean over tasks, and its margin is in per cent of its value."""
    (entry,) = load_entries([SuiteTask("sums")], [task_folder])
    before = {"sums": replace(hand_made("sums", share__none=[1.0] * 40), higher_is_better={"share,none": None})}
    after = {"sums": replace(hand_made("sums", share__none=[0.0] * 40), higher_is_better={"share,none": None})}
    found = entry_deltas(entry, before, [after], CONFIDENCE, MARGIN)
    ((delta, _),) = found
    assert (delta.higher_is_better, delta.verdict) == (None, "lower")
    ((back, _),) = entry_deltas(entry, after, [before], CONFIDENCE, MARGIN)
    assert back.verdict == "higher"
    assert mean_delta(found * 2, CONFIDENCE, MARGIN) is None
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith("task sums does not say whether a higher share is better: neither better nor worse")


def test_a_group_whose_tasks_differ_in_direction_has_none(task_folder: Path) -> None:
    (entry,) = load_entries([SuiteTask("even")], [task_folder])
    scores = {
        name: replace(hand_made(name, acc__none=[1.0, 0.0]), higher_is_better={"acc,none": direction})
        for name, direction in (("sums", True), ("words", False))
    }
    assert is_higher_better(entry, "acc,none", scores) is None
    assert is_higher_better(entry, "acc,none", {**scores, "words": replace(scores["sums"], task="words")}) is True


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
