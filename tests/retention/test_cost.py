"""What an evaluation costs is said before it begins, and how long it takes after the first batch."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from lopt_hf.retention import cost
from lopt_hf.retention.cost import duration
from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_model
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.scores import ScoreCache
from lopt_hf.retention.suites import SuiteTask, load_entries
from tests.retention.benchmark_tasks import NUM_ROWS, rows_of
from tests.retention.conftest import SavedModels
from tests.tiny import make_tokenizer

SAID = re.compile(r"([\d,]+) requests with ([\d,]+) tokens to read(?: and at most ([\d,]+) to write)?")


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the model moves: one second for each forward."""
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    return now


def evaluate(model: str, folder: Path, cache: Path, task: str, **settings: Any) -> None:
    entries = load_entries([SuiteTask(task)], [folder])
    evaluate_model(ModelReference.find(model), entries, EvaluationSettings(**settings), ScoreCache(cache))


def tokens(texts: list[str]) -> int:
    return sum(map(len, make_tokenizer()(texts, add_special_tokens=False)["input_ids"]))


def test_tokens_are_said_before_the_first_forward(
    models: SavedModels,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    expected = {
        "sums": [f"{row['question']} {choice}" for row in rows_of("sums") for choice in row["choices"]],  # type: ignore[attr-defined]
        "texts": [str(row["question"]) for row in rows_of("texts")],
        "generated": [str(row["question"]) for row in rows_of("generated")],
    }
    for name, texts in expected.items():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(HFLM, "_model_call", stopped)
            patch.setattr(HFLM, "_model_generate", stopped)
            evaluate(models.base, task_folder, tmp_path / name, name)
        found = SAID.search(capsys.readouterr().err)
        assert found is not None, name
        number, read, written = (int((text or "0").replace(",", "")) for text in found.groups())
        assert number == len(texts)
        assert read == tokens(texts)
        assert written == (NUM_ROWS["generated"] * 6 if name == "generated" else 0)


@pytest.mark.parametrize(("task", "limit"), [("sums", 21), ("generated", 24 - 6), ("texts", None)])
def test_prompts_that_are_cut_are_said_once(
    models: SavedModels,
    task_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    task: str,
    limit: int | None,
) -> None:
    """For all models together: prompts of which an answer makes too many tokens, or beside what may be written."""
    for model in (models.base, models.tuned):
        evaluate(model, task_folder, tmp_path, task, max_length=24 if task == "generated" else 21)
    said = [record.getMessage() for record in caplog.records if "lose their beginning" in record.getMessage()]
    if limit is None:  # whole texts are read in parts
        assert not said
        return
    texts = [str(row["question"]) for row in rows_of(task)]
    if task == "sums":  # of an answer the last token is not read
        texts = [f"{row['question']} {max(row['choices'], key=len)}"[:-1] for row in rows_of(task)]  # type: ignore[call-overload]
    cut, number = sum(len(text) > limit for text in texts), NUM_ROWS[task]
    assert 0 < cut < number
    assert said == [f"{cut} of {number} prompts of {task} are longer than {limit} tokens and lose their beginning."]


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize(("task", "batch"), [("words", 2), ("texts", 2), ("generated", 3)])
def test_time_is_told_from_the_first_batch(
    models: SavedModels,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: list[float],
    which: str,
    task: str,
    batch: int,
) -> None:
    """Each forward takes a minute: what is told is about what all take, and is told once, after the first batch."""
    forwards: list[int] = []
    embed = torch.nn.Embedding.forward

    def counted(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        forwards.append(ids.numel())
        seconds[0] += 60
        return embed(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    evaluate(getattr(models, which), task_folder, tmp_path, task, batch_size=batch)
    printed = capsys.readouterr().err
    (told,) = re.findall(r"About (\d+) (minutes|seconds) on this device \(.*\), by the first batch", printed)
    assert told[1] == "minutes" or len(forwards) == 2
    minutes = int(told[0]) if told[1] == "minutes" else int(told[0]) / 60
    assert 0.5 * len(forwards) <= minutes <= 1.5 * len(forwards)


def test_one_batch_is_not_measured(
    models: SavedModels, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(models.base, task_folder, tmp_path, "generated", batch_size=16)
    printed = capsys.readouterr().err
    assert len(SAID.findall(printed)) == 1
    assert "by the first batch" not in printed
    evaluate(models.base, task_folder, tmp_path, "generated", batch_size=16)  # from the cache
    assert not SAID.findall(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.2, "3 seconds"), (89, "89 seconds"), (90, "2 minutes"), (5340, "89 minutes"), (9000, "2.5 hours")],
)
def test_durations(value: float, text: str) -> None:
    assert duration(value) == text


def test_loading_shows_which_task_is_read(task_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_entries([SuiteTask("sums"), SuiteTask("texts")], [task_folder], shows_progress=True)
    printed = capsys.readouterr().err
    assert "data of sums" in printed and "2/2" in printed
    load_entries([SuiteTask("sums")], [task_folder])
    assert not capsys.readouterr().err
