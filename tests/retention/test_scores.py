"""What is taken out of lm-eval's results, and kept: of each metric also the samples that have it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lopt_hf.retention.scores import ScoreCache, TaskScores

TASK: Any = SimpleNamespace(task_name="sums", OUTPUT_TYPE="multiple_choice")
IDENTITY = {"task": "sums"}


def results(on_some: dict[int, float], **directions: bool | None) -> dict[str, Any]:
    """Of samples 0 to 3 as lm-eval logs them; only some have the metric `judged`."""
    samples = []
    for number in (2, 0, 3, 1):
        of_metrics = {"acc": 1.0, **({"judged": on_some[number]} if number in on_some else {})}
        entry = {"doc_id": number, "doc_hash": "", "doc": {}, "target": 0, "filter": "none", "filtered_resps": [0]}
        samples.append({**entry, "metrics": list(of_metrics), **of_metrics})
    values = {"acc,none": 1.0, "judged,none": 0.5}
    return {
        "samples": {"sums": samples},
        "higher_is_better": {"sums": directions},
        "results": {"sums": values},
        "versions": {},
        "n-shot": {},
    }


def test_samples_of_a_metric_that_some_have(tmp_path: Path) -> None:
    """In the order of the samples; also from a file."""
    scores = TaskScores.from_lm_eval(TASK, results({3: 0.0, 1: 1.0}))
    assert scores.metrics == {"acc,none": [1.0] * 4, "judged,none": [1.0, 0.0]}
    assert scores.doc_ids == {"judged,none": [1, 3]}
    cache = ScoreCache(tmp_path)
    cache.put(IDENTITY, scores)
    assert cache.get(IDENTITY) == scores
    assert [sample["doc_id"] for sample in scores.samples_of("judged,none")] == [1, 3]
    assert [sample["doc_id"] for sample in scores.samples_of("acc,none")] == [0, 1, 2, 3]


def test_directions_that_nobody_names() -> None:
    scores = TaskScores.from_lm_eval(TASK, results({0: 1.0}, acc=False))
    assert scores.higher_is_better == {"acc,none": False, "judged,none": None}
    scores = TaskScores.from_lm_eval(TASK, results({0: 1.0}, acc=True, judged=None))
    assert scores.higher_is_better == {"acc,none": True, "judged,none": None}


@pytest.mark.parametrize("judged", [{}, {0: 1.0, 2: 0.0}], ids=["on all samples", "on some"])
def test_files_of_earlier_versions(judged: dict[int, float], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They do not say which samples a metric is of: read where it is of all, and else left aside with one line."""
    cache = ScoreCache(tmp_path)
    scores = TaskScores.from_lm_eval(TASK, results(judged))
    cache.put(IDENTITY, scores)
    path = cache.path(IDENTITY)
    record = json.loads(path.read_text())
    del record["scores"]["doc_ids"]
    path.write_text(json.dumps(record))
    assert cache.get(IDENTITY) == (None if judged else scores)
    told = [record.getMessage() for record in caplog.records]
    assert [str(path) in message and "measured again" in message for message in told] == [True] * bool(judged)
