"""Samples that belong together are found in the tasks' documents, and are resampled together."""

import json
from pathlib import Path
from typing import Any

import pytest

from lopt_hf.common.sample_scores import MeanScores
from lopt_hf.common.statistics import mcnemar
from lopt_hf.retention.clusters import check_cluster_field, cluster_labels, with_clusters
from lopt_hf.retention.deltas import entry_deltas
from lopt_hf.retention.scores import TaskScores
from lopt_hf.retention.suites import SuiteTask, TaskEntry, load_entries

TASK = """\
task: passages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{passage}}}} {{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
NUM_ROWS, QUESTIONS = 60, 4


def make_entry(folder: Path, **columns: list[Any]) -> TaskEntry:
    """A task of 15 passages with four questions each, and further columns."""
    rows: list[dict[str, Any]] = [
        {
            "passage": f"text {i // QUESTIONS}",
            "question": f"{i}?",
            **{name: values[i] for name, values in columns.items()},
        }
        for i in range(NUM_ROWS)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "passages.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    (entry,) = load_entries([SuiteTask("passages")], [folder])
    return entry


def scores(values: list[float]) -> dict[str, TaskScores]:
    samples = [{"doc_id": i, "doc_hash": "", "doc": {}} for i in range(len(values))]
    return {"passages": TaskScores("passages", "1", 0, {"acc,none": values}, {}, {"acc,none": True}, samples)}


def test_questions_on_one_passage_belong_together(tmp_path: Path) -> None:
    (task,) = make_entry(tmp_path).tasks
    assert cluster_labels(task, range(NUM_ROWS)) == [i // QUESTIONS for i in range(NUM_ROWS)]
    assert cluster_labels(task, range(NUM_ROWS), "none") is None


def test_labels_are_of_the_documents_measured(tmp_path: Path) -> None:
    """A chosen sample has the passage of its own document, not that of its place among the chosen."""
    (task,) = make_entry(tmp_path).tasks
    chosen = [59, 0, 58, 5, 1, *range(8, 60, 4)]
    labels = cluster_labels(task, chosen)
    assert labels is not None and labels[:5] == [0, 1, 0, 2, 1]
    passages = [number // QUESTIONS for number in chosen]
    pairs = [(i, j) for i in range(len(chosen)) for j in range(i)]
    assert [labels[i] == labels[j] for i, j in pairs] == [passages[i] == passages[j] for i, j in pairs]


def test_a_field_with_a_value_for_each_sample_or_few_values_is_no_cluster(tmp_path: Path) -> None:
    """`auto` goes on to the next field, and takes none that has fewer than ten values."""
    columns = {"article": [i % 3 for i in range(NUM_ROWS)], "subject": [i // 5 for i in range(NUM_ROWS)]}
    (task,) = make_entry(tmp_path, **columns).tasks
    alone = list(range(0, 60, 4))  # one question of each passage
    labels = cluster_labels(task, alone)
    assert labels is not None and len(set(labels)) == 12  # of the subjects
    assert cluster_labels(task, range(NUM_ROWS), "article") == columns["article"]
    assert cluster_labels(task, range(NUM_ROWS), "question") is None


def test_interval_is_over_clusters_and_says_how_many(tmp_path: Path) -> None:
    """Of passages lost as a whole it is wider than of as many samples; no test takes the samples for independent."""
    entry = make_entry(tmp_path)
    before, after = [1.0] * NUM_ROWS, [float(i // QUESTIONS >= 3) for i in range(NUM_ROWS)]
    found = {}
    for cluster_by in ("none", "auto"):
        pair = [with_clusters(scores(values), entry.tasks, cluster_by) for values in (before, after)]
        ((found[cluster_by], _),) = entry_deltas(entry, pair[0], pair[1:], 0.95, 1.0)
    alone, together = found["none"], found["auto"]
    assert alone.delta == together.delta == pytest.approx(-0.2)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    assert (alone.n, alone.num_clusters) == (60, None) and (together.n, together.num_clusters) == (60, 15)
    assert (
        (together.right_to_wrong, together.wrong_to_right) == (alone.right_to_wrong, alone.wrong_to_right) == (12, 0)
    )
    assert alone.p_value == alone.p == mcnemar(MeanScores(before), MeanScores(after))[0]
    assert together.p_value is None and together.p == together.p_interval > 50 * alone.p


def test_unknown_field_is_named_with_the_nearest(tmp_path: Path) -> None:
    tasks = make_entry(tmp_path).tasks
    check_cluster_field(tasks, "auto")
    check_cluster_field(tasks, "question")
    with pytest.raises(ValueError, match="cluster_by='pasage' is auto, none, or a field .*did you mean 'passage'"):
        check_cluster_field(tasks, "pasage")
