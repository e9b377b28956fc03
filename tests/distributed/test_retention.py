"""Two processes share the samples out and score as one does."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_model
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.scores import ScoreCache, TaskScores
from lopt_hf.retention.suites import SuiteTask, load_entries
from tests.distributed.conftest import LAUNCH, ROOT, TwoProcesses
from tests.retention.benchmark_tasks import NUM_ROWS, write_benchmark_tasks
from tests.retention.conftest import moved, save
from tests.tiny import make_model

TASKS = ("sums", "texts", "generated")


def launch(notes: Path, *options: object) -> list[dict[str, Any]]:
    """Runs two ranks, and returns what each was asked."""
    notes.mkdir()
    command = [*LAUNCH, "-m", "tests.distributed.retention_worker", str(notes)]
    result = subprocess.run([*command, *map(str, options)], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((notes / f"rank-{rank}.json").read_text()) for rank in range(2)]


def in_cache(folder: Path) -> dict[str, TaskScores]:
    return {
        path.name: TaskScores(**json.loads(path.read_text())["scores"])
        for path in folder.glob("*.json")
        if not path.name.startswith(("drift", "similarity"))
    }


def requests_of(notes: dict[str, Any], method: str, model: str) -> set[str]:
    """What one rank was asked; lm-eval asks some twice so that ranks have equal numbers."""
    return {request for name, requests in notes[method] if name == model for request in requests}


def flat(value: Any) -> list[float]:
    return [item for part in value for item in flat(part)] if isinstance(value, list) else [float(value)]


def test_two_processes_score_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank answers its half, one writes, also if a killed run of one process left answers of one kind."""
    tasks = write_benchmark_tasks(tmp_path / "tasks")
    base = make_model()
    folders = {"base": save(base, tmp_path / "base"), "tuned": save(moved(base), tmp_path / "tuned")}
    entries = load_entries([SuiteTask(name) for name in TASKS], [tasks])
    settings, one, two = (
        EvaluationSettings(dtype="float32"),
        ScoreCache(tmp_path / "one"),
        ScoreCache(tmp_path / "two"),
    )

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(two, "put", interrupted)
        evaluate_model(ModelReference.find(folders["base"]), [entries[1]], settings, two)
    options = ["--baseline", folders["base"], "--model", f"tuned={folders['tuned']}", "--tasks", ",".join(TASKS)]
    options += ["--include-path", str(tasks), "--cache-dir", str(two.folder), "--output-dir", str(tmp_path / "out")]
    ranks = launch(tmp_path / "notes", *options)

    for folder in folders.values():
        evaluate_model(ModelReference.find(folder), entries, settings, one)
    by_one, by_two = in_cache(one.folder), in_cache(two.folder)
    assert len(by_one) == 6 and by_one.keys() == by_two.keys()
    for name, scores in by_one.items():
        assert [sample["doc_hash"] for sample in scores.samples] == [s["doc_hash"] for s in by_two[name].samples]
        for metric, values in scores.metrics.items():
            assert flat(by_two[name].metrics[metric]) == pytest.approx(flat(values), rel=1e-5), (name, metric)

    expected = {"loglikelihood": 3 * NUM_ROWS["sums"], "generate_until": NUM_ROWS["generated"]}
    for model in folders:
        for method, number in expected.items():
            first, second = (requests_of(rank, method, model) for rank in ranks)
            assert not first & second
            assert len(first | second) == number
            assert len(first) - len(second) in (0, 1)
    texts = [[len(requests_of(rank, "loglikelihood_rolling", model)) for rank in ranks] for model in folders]
    assert texts == [[0, NUM_ROWS["texts"] // 2], [NUM_ROWS["texts"] // 2] * 2]
    assert [len(rank["write_report"]) for rank in ranks] == [1, 0]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["models"][0]["label"] == "tuned"


def test_a_callback_in_two_processes(two_processes: TwoProcesses, tmp_path: Path) -> None:
    """Training ends with the same weights as without it, and the figures are those of one process."""
    plain, measured = two_processes.weights("plain"), two_processes.weights("retention")
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    logs = json.loads((two_processes.folder / "retention" / "log_history.json").read_text())
    rows = [row for row in logs if "retention/tiny_sums/acc" in row]
    assert [row["step"] for row in rows] == [0, 2, 3]
    base = ModelReference.find(save(make_model(), tmp_path / "base"))
    entries = load_entries([SuiteTask("tiny_sums"), SuiteTask("tiny_text")], [two_processes.folder / "tasks"])
    scores = evaluate_model(base, entries, EvaluationSettings(), ScoreCache(tmp_path / "cache"))
    assert rows[0]["retention/tiny_sums/acc"] == scores["tiny_sums"].values["acc,none"]
    expected = scores["tiny_text"].values["word_perplexity,none"]
    assert rows[0]["retention/tiny_text/word_perplexity"] == pytest.approx(expected, rel=1e-5)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt
