"""Bad data end a training command with one line and status 2, before the model is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import trainer_optimizer

from lopt_hf import cli
from lopt_hf.scripts import sft
from tests.scripts.test_training import COMMANDS, arguments

PAIR = {"instruction": "Hi", "output": "Hello"}
DPO = {"question": "Hi", "chosen": "Hello", "rejected": "Go away"}


# Optimizers that come with a package, and how transformers tells that it is there
WITH_PACKAGES = {
    "adamw_8bit": "is_bitsandbytes_available",
    "paged_lion_32bit": "is_bitsandbytes_available",
    "schedule_free_adamw": "is_schedulefree_available",
    "lomo": "is_lomo_available",
}


@pytest.fixture(autouse=True)
def no_package_of_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(WITH_PACKAGES.values()):
        monkeypatch.setattr(trainer_optimizer, name, lambda *args: False)


@pytest.fixture(autouse=True)
def separate_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def run(command: str, given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that a refused command says; no traceback comes with it."""
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *given])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "rows", "message"),
    [
        ("sft", [PAIR] * 6 + [{"instruction": "Hi", "output": None}], "row 7: 'output' is null; give it text, or"),
        ("mlaan", [PAIR, {"instruction": 3, "output": "Hello"}], "row 2: 'instruction' holds int 3, not text"),
        ("dpo", [DPO, {**DPO, "rejected": ""}], "row 2: 'rejected' is empty"),
        ("grpo", [{"question": "Hi", "answer": "2"}, {"question": None, "answer": "2"}], "row 2: 'question' is null"),
        (
            "grpo",
            [{"question": "Hi", "answer": "2"}, {"question": "Hi"}],
            "row 2: 'answer' is None, with which the re",
        ),
        ("sft", ['{"instruction": "Hi", "outp'], "rows.jsonl, line 1: no valid JSON"),
        ("dpo", [json.dumps(DPO), str(DPO)], "rows.jsonl, line 2: "),
        ("pipeline", [{**PAIR, "output": ["Hello"]}], "row 1: 'output' holds list ['Hello'], not text"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
def test_a_bad_row_ends_a_command(
    tmp_path: Path,
    command: str,
    rows: list[Any],
    message: str,
    streaming: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    values = {"dataset_name": str(tmp_path / "rows.jsonl"), "dataset_streaming": streaming, "max_steps": 9}
    if not streaming:
        values["model_name_or_path"] = str(tmp_path / "nowhere")  # no model is loaded before the rows are checked
    if command == "mlaan":
        values |= {"num_blocks": 2, "window": 1, "calibration_tokens": 8}
    given = arguments(tmp_path, command if command in COMMANDS else "sft", **values)
    line = run(command, given, capsys)
    assert message in line and line.startswith(f"lopt-hf {command}: ")


def test_a_row_far_down_a_stream_ends_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is read in a worker of the data loader, which puts its traceback into the message."""
    rows = [PAIR] * 20 + [{**PAIR, "output": None}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"dataset_name": str(tmp_path / "rows.jsonl"), "dataset_streaming": True, "max_steps": 20}
    for workers in (0, 1):
        given = arguments(
            tmp_path, "sft", **values, dataloader_num_workers=workers, output_dir=str(tmp_path / f"{workers}")
        )
        line = run("sft", given, capsys)
        assert line == "lopt-hf sft: row 21: 'output' is null; give it text, or remove the row."


@pytest.mark.parametrize("method", ["lopt", "mlaan", "e2e"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_length_that_cuts_every_answer_is_refused(
    tmp_path: Path, method: str, packing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"num_blocks": 2, "window": 1} if method == "mlaan" else {}
    given = arguments(tmp_path, "sft", method=method, packing=packing, max_length=4, **options)
    line = run("sft", given, capsys)
    assert line.startswith("lopt-hf sft: max_length=4 cuts off every answer: no row of the train_dataset has a token")


@pytest.mark.parametrize("method", ["lopt", "e2e"])
def test_so_it_is_for_preferences(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = run("dpo", arguments(tmp_path, "dpo", method=method, max_length=4), capsys)
    assert line.startswith("lopt-hf dpo: max_length=4 cuts off every answer")


def test_a_pipeline_starts_no_stage_whose_answers_are_all_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"num_stages": 2, "max_length": 4}
    line = run("pipeline", arguments(tmp_path, "sft", **values), capsys)
    assert line.startswith("lopt-hf pipeline: max_length=4 cuts off every answer: no row of the train_dataset has")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_stages": 9}, "num_blocks=9 does not fit a model with 4 layers"),
        ({"model_name_or_path": "/nowhere"}, "/nowhere"),
        ({"optim": "lomo", "gradient": "local"}, "optim='lomo' cannot be used here: "),
    ],
)
def test_what_a_stage_could_not_do_is_said_before_it_is_started(
    tmp_path: Path, values: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run("pipeline", arguments(tmp_path, "sft", **{"num_stages": 2, **values}), capsys)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("optim", WITH_PACKAGES)
def test_an_optimizer_of_a_package_that_is_not_here_is_named_before_the_model_is_loaded(
    tmp_path: Path, command: str, optim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path, command, optim=optim)
    shutil.rmtree(tmp_path / "base")
    line = run(command, given, capsys)
    assert line.startswith(f"lopt-hf {command}: optim={optim!r} cannot be used here: ") and "install" in line


def test_rows_whose_answers_are_cut_off_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [PAIR, {"instruction": "Hi " * 100, "output": "Hello"}, PAIR]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sft.main(arguments(tmp_path, "sft", dataset_name=str(tmp_path / "rows.jsonl"), max_length=48))
    assert "max_length=48 cuts off the whole answer of 1 of 3 rows, which are left out." in caplog.messages
