"""The callback measures the untouched model first, logs through the Trainer, and does not disturb training."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lopt_hf import RetentionCallback
from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_model
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.scores import ScoreCache
from lopt_hf.retention.suites import SuiteTask, load_entries
from tests.machine import set_machine
from tests.retention.conftest import save
from tests.retention.small_tasks import write_tasks
from tests.tiny import make_dataset, make_model, make_tokenizer
from tests.trainers.helpers import make_stock_trainer, make_trainer, snapshot

ACCURACY = "retention/tiny_sums/acc"
TASKS = ["tiny_sums", "tiny_text"]


class Recorder(TrainerCallback):
    """Stands for a reporting integration: keeps what `on_log` is handed."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({"step": state.global_step, **logs})


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def make_callback(folder: Path, **options: Any) -> RetentionCallback:
    return RetentionCallback(**{"tasks": TASKS, "include_path": folder, "every_steps": 2, "limit": 8, **options})


def test_logs_before_during_and_after_training(tmp_path: Path, tasks: Path) -> None:
    """At steps 0, 2, 4 and at the end; the change from step 1 on; through the log history and the integrations."""
    trainer = make_trainer(tmp_path / "out", max_steps=5)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.add_callback(make_callback(tasks))
    trainer.train()
    rows = [row for row in trainer.state.log_history if ACCURACY in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert f"{ACCURACY}_delta" not in rows[0]
    for row in rows[1:]:
        assert row[f"{ACCURACY}_delta"] == pytest.approx(row[ACCURACY] - rows[0][ACCURACY])
        assert row[f"{ACCURACY}_low"] <= row[f"{ACCURACY}_delta"] <= row[f"{ACCURACY}_high"]
        assert row["retention/tiny_text/word_perplexity"] > 0
    assert [row["step"] for row in recorder.logs if ACCURACY in row] == [0, 2, 4, 5]


def test_last_step_is_measured_once(tmp_path: Path, tasks: Path) -> None:
    trainer = make_trainer(tmp_path / "out", max_steps=4)
    trainer.add_callback(make_callback(tasks))
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if ACCURACY in row] == [0, 2, 4]


@pytest.mark.parametrize("best", [1, 4])
def test_the_best_model_is_measured_again(
    tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    """It is not the last step's, which was measured, unless the last step is the best."""
    trainer = make_trainer(
        tmp_path / "out",
        max_steps=4,
        learning_rate=0.5 if best == 1 else 1e-3,  # the loss only rises, or only falls
        trainer_kwargs={"eval_dataset": make_dataset(8)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.add_callback(make_callback(tasks))
    trainer.train()
    assert trainer.state.best_global_step == best
    rows = [row for row in trainer.state.log_history if ACCURACY in row]
    assert [row["step"] for row in rows] == ([0, 2, 4, 4] if best == 1 else [0, 2, 4])
    loss = "retention/tiny_text/word_perplexity"
    assert best == 4 or rows[-1][loss] != rows[-2][loss]


def test_an_adapter_is_measured(tmp_path: Path, tasks: Path) -> None:
    """As its merged model; and training is not disturbed."""
    weights = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        peft = {"peft_config": LoraConfig(target_modules="all-linear", lora_dropout=0.1)}
        trainer = make_trainer(tmp_path / f"out{with_callback}", max_steps=4, learning_rate=0.05, trainer_kwargs=peft)
        if with_callback:
            trainer.add_callback(make_callback(tasks))
        trainer.train()
        weights.append(snapshot(trainer))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    rows = [row for row in trainer.state.log_history if ACCURACY in row]
    save(trainer.model.merge_and_unload(), tmp_path / "merged")
    settings, entries = EvaluationSettings(limit=8), load_entries([SuiteTask(name) for name in TASKS], [tasks])
    merged = ModelReference.find(str(tmp_path / "merged"))
    scores = evaluate_model(merged, entries, settings, ScoreCache(tmp_path / "cache"))
    perplexities = [row["retention/tiny_text/word_perplexity"] for row in rows]
    assert perplexities[-1] == pytest.approx(scores["tiny_text"].values["word_perplexity,none"], rel=1e-4)
    assert perplexities[0] != pytest.approx(perplexities[-1], rel=1e-3)


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_training_is_not_disturbed(tmp_path: Path, tasks: Path, num_blocks: int) -> None:
    """The same weights bit for bit, the same losses, with dropout drawing random numbers all the while."""
    runs = []
    for with_callback in (False, True):
        model = make_model("gpt2", resid_pdrop=0.2)
        trainer = make_trainer(tmp_path / f"out{with_callback}", model, max_steps=5, num_blocks=num_blocks)
        if with_callback:
            trainer.add_callback(make_callback(tasks))
        trainer.train()
        logs = [row for row in trainer.state.log_history if "grad_norm" in row]
        clock = ("runtime", "per_second")
        runs.append((snapshot(trainer), [{k: v for k, v in r.items() if not k.endswith(clock)} for r in logs]))
    (plain, plain_logs), (measured, measured_logs) = runs
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    assert plain_logs == measured_logs


def test_figures_are_those_of_the_stock_model(tmp_path: Path, tasks: Path) -> None:
    """The first is the untouched base's and the last the saved checkpoint's, as the benchmark measures them."""
    model = make_model()
    entries = load_entries([SuiteTask(name) for name in TASKS], [tasks])
    copy.deepcopy(model).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", model, max_steps=4)
    trainer.add_callback(make_callback(tasks))
    trainer.train()
    trainer.save_model()
    rows = [row for row in trainer.state.log_history if ACCURACY in row]
    for folder, row in ((tmp_path / "base", rows[0]), (tmp_path / "out", rows[-1])):
        settings = EvaluationSettings(limit=8, batch_size=8)
        scores = evaluate_model(ModelReference.find(str(folder)), entries, settings, ScoreCache(tmp_path / "cache"))
        assert row[ACCURACY] == scores["tiny_sums"].values["acc,none"]
        expected = scores["tiny_text"].values["word_perplexity,none"]
        assert row["retention/tiny_text/word_perplexity"] == pytest.approx(expected, rel=1e-6)


class Ruin(TrainerCallback):
    """Makes the model so sure of the wrong characters that no float holds its perplexity."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1e5)


def test_training_goes_on_when_the_model_diverges(tmp_path: Path, tasks: Path) -> None:
    trainer = make_trainer(tmp_path / "out", max_steps=4)
    trainer.add_callback(Ruin())
    trainer.add_callback(make_callback(tasks))
    trainer.train()
    rows = [row for row in trainer.state.log_history if ACCURACY in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    name = "retention/tiny_text/word_perplexity"
    assert [row[name] for row in rows[1:]] == [math.inf] * 2
    assert [row[f"{name}_delta"] for row in rows[1:]] == [math.inf] * 2
    assert all(math.isfinite(row[f"{ACCURACY}_delta"]) for row in rows[1:])


def test_resumed_run_compares_with_the_first_beginning(tmp_path: Path, tasks: Path) -> None:
    whole = make_trainer(tmp_path / "whole", max_steps=6)
    whole.add_callback(make_callback(tasks))
    whole.train()
    first = make_trainer(tmp_path / "out", max_steps=6, save_strategy="steps", save_steps=3)
    first.add_callback(make_callback(tasks))
    first.train()
    for left in ("checkpoint-6",):
        for path in sorted((tmp_path / "out" / left).iterdir(), reverse=True):
            path.unlink()
        (tmp_path / "out" / left).rmdir()
    resumed = make_trainer(tmp_path / "out", max_steps=6, save_strategy="steps", save_steps=3)
    resumed.add_callback(make_callback(tasks))
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "out")))
    last = [
        [row for row in trainer.state.log_history if f"{ACCURACY}_delta" in row][-1] for trainer in (whole, resumed)
    ]
    retained = [{key: value for key, value in row.items() if key.startswith("retention/")} for row in last]
    assert retained[0] == retained[1]


def test_resuming_without_a_beginning_is_an_error(tmp_path: Path, tasks: Path) -> None:
    make_trainer(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(tmp_path / "out", max_steps=4)
    trainer.add_callback(make_callback(tasks))
    with pytest.raises(ValueError, match="before training is unknown"):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "out")))


def test_resuming_from_a_damaged_file_is_an_error(tmp_path: Path, tasks: Path) -> None:
    make_trainer(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2).train()
    (tmp_path / "out" / "retention_baseline.json").write_text('{"scores": {"ta')
    trainer = make_trainer(tmp_path / "out", max_steps=4)
    trainer.add_callback(make_callback(tasks))
    with pytest.raises(ValueError, match="retention_baseline.json is damaged .*; resume without the callback, and"):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 6}, "limit=6, but .*retention_baseline.json was measured with limit=8"),
        ({"num_fewshot": 1}, "num_fewshot=1, but .* with num_fewshot=None"),
        ({"tasks": [*TASKS, "offline_prose"]}, "has no scores of offline_prose"),
        ({}, "task 'tiny_sums' is not the one that .*: documents changed"),
    ],
)
def test_resuming_with_other_questions_is_an_error(
    tmp_path: Path, tasks: Path, options: dict[str, Any], message: str
) -> None:
    """Other settings, tasks or documents, found before a step is made."""
    first = make_trainer(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2)
    first.add_callback(make_callback(tasks))
    first.train()
    if not options:
        path = tasks / "sums.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace("What is 3", "What was 3"), encoding="utf-8")
    trainer = make_trainer(tmp_path / "out", max_steps=4)
    trainer.add_callback(make_callback(tasks, **options))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "out")))
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize(("bf16", "expected"), [(False, "float32"), (True, "bfloat16"), (None, None)])
def test_computes_as_the_model_trains(
    tmp_path: Path,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bf16: bool | None,
    expected: str | None,
    has_bfloat16: bool,
) -> None:
    """Which, unset, is the faster way; the type is kept with the beginning."""
    set_machine(monkeypatch, has_bfloat16)
    expected = expected or ("bfloat16" if has_bfloat16 else "float32")
    trainer = make_stock_trainer(tmp_path / "out", max_steps=1, bf16=bf16) if bf16 else None
    trainer = trainer or make_trainer(tmp_path / "out", max_steps=1, bf16=bf16)
    seen: set[bool] = set()
    trainer.model.model.layers[0].register_forward_pre_hook(
        lambda module, inputs: None if module.training else seen.add(torch.is_autocast_enabled("cpu"))
    )
    trainer.add_callback(make_callback(tasks, trainer=trainer))
    trainer.train()
    assert seen == {expected == "bfloat16"}
    stored = json.loads((tmp_path / "out" / "retention_baseline.json").read_text(encoding="utf-8"))
    assert stored["settings"]["dtype"] == expected
    assert ("GFLOP/s" in caplog.text) == (expected == "bfloat16" and not has_bfloat16)


def test_resuming_in_another_type_is_an_error(tmp_path: Path, tasks: Path) -> None:
    first = make_trainer(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2)
    first.add_callback(make_callback(tasks))
    first.train()
    trainer = make_trainer(tmp_path / "out", max_steps=4, bf16=True)
    trainer.add_callback(make_callback(tasks))
    with pytest.raises(ValueError, match="dtype=bfloat16, but .*json was measured with dtype=float32"):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "out")))


def test_any_trainer(tmp_path: Path, tasks: Path) -> None:
    """TRL's own trainer is passed; without it the error says so."""
    trainer = make_stock_trainer(tmp_path / "bound", max_steps=2)
    trainer.add_callback(make_callback(tasks, trainer=trainer))
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if ACCURACY in row] == [0, 2]
    unbound = make_stock_trainer(tmp_path / "unbound", max_steps=2)
    unbound.add_callback(make_callback(tasks))
    with pytest.raises(ValueError, match=r"RetentionCallback\(..., trainer=trainer\)"):
        unbound.train()


def test_callback_given_to_the_constructor(tmp_path: Path, tasks: Path) -> None:
    trainer = make_trainer(
        tmp_path / "out", trainer_kwargs={"callbacks": [make_callback(tasks, every_steps=None)]}, max_steps=3
    )
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if ACCURACY in row] == [0, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "every_steps=0"),
        ({"limit": 0}, "limit=0"),
        ({"tasks": "tiny_sums,tiny_text"}, "one string"),
        ({"confidence": 95}, "confidence=95 is not between 0 and 1"),
        ({"confidence": 0}, "confidence=0 is not between 0 and 1"),
    ],
)
def test_bad_values(tasks: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_callback(tasks, **options)


def test_unknown_task_offers_the_nearest(tasks: Path) -> None:
    with pytest.raises(ValueError, match="'tiny_sum' is unknown; nearest are tiny_sums"):
        make_callback(tasks, tasks=["tiny_sum"])
