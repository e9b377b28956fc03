"""`lopt-hf retention`: from tiny models to a report, and one clear line where something is wrong."""

import errno
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.model import CacheHook
from lm_eval.tasks import TaskManager
from peft import PromptTuningConfig, get_peft_model

from lopt_hf.retention import evaluation, suites
from lopt_hf.retention.report import report as report_module
from lopt_hf.scripts import retention
from tests.retention.benchmark_tasks import write_benchmark_tasks
from tests.retention.conftest import SavedModels, save
from tests.tiny import VOCABULARY, make_model, make_tokenizer

Arguments = dict[str, str | list[str]]


@pytest.fixture(autouse=True)
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves lm-eval's tasks out, whose index takes some seconds."""
    monkeypatch.setattr(
        suites,
        "TaskManager",
        lambda include_path, include_defaults=True: TaskManager(include_path=include_path, include_defaults=False),
    )


@pytest.fixture
def arguments(models: SavedModels, task_folder: Path, tmp_path: Path) -> Arguments:
    """A run over two tasks and two models."""
    return {
        "--baseline": models.base,
        "--model": [f"tuned={models.tuned}", models.adapter],
        "--tasks": "sums,texts",
        "--include-path": str(task_folder),
        "--output-dir": str(tmp_path / "out"),
        "--cache-dir": str(tmp_path / "cache"),
    }


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluation, "load_language_model", forbidden)


def run(arguments: Arguments, *flags: str) -> None:
    given: list[str] = list(flags)
    for name, value in arguments.items():
        for one in [value] if isinstance(value, str) else value:
            given += [name, one]
    retention.main(given)


def error_of(arguments: Arguments, *flags: str) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as exit_info:
        run(arguments, *flags)
    message = str(exit_info.value)
    assert message.startswith("lopt-hf retention: ")
    assert exit_info.value.code == (message if "the disk is full" in message else 2)
    return message


def test_samples_needed_are_told_beforehand(
    arguments: Arguments, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the baseline alone: of 0 or 1 per sample the variance is p (1 - p), and Miller's formula has the rest."""
    del arguments["--model"], arguments["--output-dir"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # it draws nothing
    run(arguments, "--detect", "2.5", "--correlation", "0.8")
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    headers, _, sums, texts = table
    assert headers[5:] == ["Needs", "Enough", "Smallest seen now"]
    assert sums[:2] == ["sums", "acc"] and texts[:2] == ["texts", "word_perplexity"]
    share, number = float(sums[2].split()[0]), int(sums[3])
    expected = (1.959964 + 0.841621) ** 2 * 2 * (1 - 0.8) * share * (1 - share) / 0.025**2
    assert int(sums[5].replace(",", "")) == pytest.approx(expected, rel=0.1)  # the bootstrap's noise
    assert float(sums[7]) == pytest.approx(0.025 * (expected / number) ** 0.5, rel=0.1)
    assert sums[6] == "no" and float(texts[4]) == pytest.approx(0.025 * float(texts[2].split()[0]), rel=1e-3)
    assert not (tmp_path / "out").exists() and not (tmp_path / "retention-report").exists()


@pytest.mark.parametrize(
    ("flags", "without_model", "message"),
    [
        ([], True, "required: --model (or --detect"),
        (["--detect", "1"], False, "without a report; leave out --model."),
        (["--detect", "1", "--heldout-data", "rows.jsonl"], True, "leave out --heldout-data."),
        (["--detect", "1", "--margin", "0.5", "--no-drift"], True, "leave out --margin, --no-drift."),
        (["--detect", "1", "--output-dir", "elsewhere"], True, "leave out --output-dir."),
        (["--detect", "1", "--adapter-base", "BASE"], True, "no model is an adapter; leave it out."),
        (["--detect", "0"], True, "detect=0.0 is no change"),
        (["--detect", "1", "--correlation", "1"], True, "correlation=1.0 is not from -1 to below 1"),
        (["--correlation", "0.5"], False, "correlation=0.5 is for --detect"),
        (["--margin", "0"], False, "margin=0.0 is no change"),
        (["--num-heldout", "3"], False, "num_heldout=3 is for --heldout-data; leave it out, or name such data."),
        (["--heldout-split", "test"], False, "heldout_split=test is for --heldout-data; leave it out"),
        (["--cluster-by", "pasage"], False, "cluster_by='pasage' is auto, none, or a field"),
    ],
)
def test_what_is_asked_makes_no_sense(
    arguments: Arguments, nothing_is_loaded: None, flags: list[str], without_model: bool, message: str
) -> None:
    if without_model:
        del arguments["--model"]
    if "--detect" in flags:  # which writes no report
        del arguments["--output-dir"]
    flags = [str(arguments["--baseline"]) if flag == "BASE" else flag for flag in flags]
    assert message in error_of(arguments, *flags)


def test_from_models_to_a_report(
    arguments: Arguments,
    models: SavedModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Report, page and changed answers are there and the table is printed; a second run evaluates nothing."""
    arguments |= {"--heldout-data": write_heldout(tmp_path / "heldout.jsonl", 6), "--num-heldout": "4"}
    run(arguments)
    out = tmp_path / "out"
    assert {"report.json", "report.md", "report.html", "flips.jsonl"} <= {path.name for path in out.iterdir()}
    report = json.loads((out / "report.json").read_text())
    assert report["baseline"] == models.base
    assert report["settings"]["command"].startswith(f"lopt-hf retention --baseline {models.base} --model tuned=")
    assert [result["label"] for result in report["models"]] == ["tuned", models.adapter]
    for result in report["models"]:
        assert {delta["task"] for delta in result["deltas"]} == {"sums", "texts"}
        assert result["gain"]["n"] == 4
        assert set(result["drift"]) == {"embeddings", "0", "1", "2", "3", "rest"}
    rows = [json.loads(line) for line in (out / "flips.jsonl").read_text().splitlines()]
    of_tuned = report["models"][0]["deltas"][0]
    changed = [row for row in rows if (row["model"], row["metric"]) == ("tuned", f"{of_tuned['metric']},none")]
    assert len(changed) == of_tuned["right_to_wrong"] + of_tuned["wrong_to_right"] > 0
    printed = capsys.readouterr().out
    assert (out / "report.md").read_text().strip() in printed
    assert all(str(out / name) in printed for name in ("report.json", "report.html", "flips.jsonl"))

    written = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".png"}
    monkeypatch.setattr(evaluation, "load_language_model", None)
    monkeypatch.setattr(lm_eval, "evaluate", None)
    run(arguments)
    assert f"The earlier report in {out} will be replaced." in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".png"} == written


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_diverged_model_is_reported(arguments: Arguments, diverged: str, tmp_path: Path) -> None:
    """Its perplexity as infinite, which JSON calls `null`; the other models' as ever."""
    run({**arguments, "--model": [f"diverged={diverged}", *arguments["--model"]]})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    values = {
        result["label"]: delta["value"]
        for result in report["models"]
        for delta in result["deltas"]
        if delta["metric"] == "word_perplexity"
    }
    assert values["diverged"] is None and values["tuned"] > 1
    assert "|word_perplexity|↓" in (tmp_path / "out" / "report.md").read_text().replace(" ", "")


def test_the_help_names_the_packages_of_ifeval(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        retention.main(["--help"])
    assert 'pip install "lopt_hf[ifeval]"' in capsys.readouterr().out
    assert '\nifeval = ["lm-eval[ifeval]>=' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_no_drift(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopt_hf.retention.benchmark.layer_drift", None)
    run(arguments, "--no_drift", "--limit", "3")  # options of trainers have underscores
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [delta["n"] for delta in report["models"][0]["deltas"]][:1] == [3]
    assert report["models"][0]["drift"] == {}


def test_a_path_may_hold_the_sign_of_labels(arguments: Arguments, models: SavedModels, tmp_path: Path) -> None:
    folder = shutil.copytree(models.tuned, tmp_path / "lr=1e-4")
    arguments |= {"--model": [str(folder), f"fast={folder}"], "--tasks": "words"}
    run(arguments, "--no-drift")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [result["label"] for result in report["models"]] == [str(folder), "fast"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--tasks": "sums,txets"}, "task 'txets' is unknown; nearest are texts"),
        ({"--tasks": "sums,words,sums"}, "task 'sums' is asked for twice, alone or in a group; name it once."),
        ({"--tasks": "sums,even"}, "task 'sums' is asked for twice, alone or in a group; name it once."),
        ({"--tasks": ""}, "tasks='' names nothing; give names with commas between"),
        ({"--tasks": " , "}, "tasks=' , ' names nothing; give names with commas between"),
        ({"--include-path": "nowhere"}, "include_path=nowhere is not a folder; name one that holds lm-eval task"),
        ({"--confidence": "95"}, "confidence=95.0 is not between 0 and 1; 0.95 is usual."),
        ({"--limit": "0"}, "limit=0 leaves nothing to measure; set it to 1 or more"),
        ({"--dtype": "fp8"}, "dtype='fp8' is unknown; use auto, float32, bfloat16 or float16."),
        ({"--baseline": "/nowhere/model"}, "model '/nowhere/model' is no folder here, and not to be had from the hub"),
        ({"--baseline": "nowhere"}, "model 'nowhere' has no config.json and no adapter_config.json, here or on the"),
        ({"--model": "/nowhere/model"}, "model '/nowhere/model' is no folder here, and not to be had from the hub"),
        ({"--model": "label="}, "model='label=' names no label or no model; give LABEL=MODEL, or MODEL alone."),
        ({"--model": "=model"}, "model='=model' names no label or no model; give LABEL=MODEL, or MODEL alone."),
        ({"--heldout-data": "nowhere.jsonl"}, "There is no file or folder 'nowhere.jsonl'"),
        ({"--num-heldout": "0", "--heldout-data": "rows.jsonl"}, "num_heldout=0 leaves nothing to measure; set it to"),
    ],
)
def test_wrong_arguments(
    arguments: Arguments,
    nothing_is_loaded: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    change: Arguments,
    message: str,
) -> None:
    """One line that names the field, its value and what to do, before a model is loaded and anything is written."""
    assert message in error_of({**arguments, **change})
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--limit": "0"}, "limit=0 leaves nothing to measure"),
        ({"--max-length": "0"}, "max_length=0 leaves nothing to measure"),
        ({"--confidence": "95"}, "confidence=95.0 is not between 0 and 1"),
        ({"--margin": "0"}, "margin=0.0 is no change"),
        ({"--heldout-data": "nowhere.jsonl"}, "There is no file or folder 'nowhere.jsonl'"),
        ({"--baseline": "/nowhere/model"}, "model '/nowhere/model' is no folder here"),
        ({"--model": "/nowhere/model"}, "model '/nowhere/model' is no folder here"),
        ({"--model": ["one=model", "one=other"]}, "models ['one', 'one'] must be at least one, and each named once."),
        ({"--adapter-base": "/nowhere/model"}, "adapter_base='/nowhere/model' is no model here or on the hub"),
    ],
)
def test_what_needs_no_tasks_is_checked_before_them(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, change: Arguments, message: str
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("tasks were loaded")

    monkeypatch.setattr(retention, "load_entries", forbidden)
    assert message in error_of({**arguments, **change})


def test_the_same_label_twice(arguments: Arguments, models: SavedModels, nothing_is_loaded: None) -> None:
    arguments["--model"] = [f"one={models.tuned}", f"one={models.merged}"]
    assert "models ['one', 'one'] must be at least one, and each named once." in error_of(arguments)


def test_another_vocabulary(arguments: Arguments, nothing_is_loaded: None, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["new"])
    folder = save(make_model(vocab_size=len(tokenizer)), tmp_path / "other")
    tokenizer.save_pretrained(folder)
    message = error_of({**arguments, "--model": folder})
    assert f"model '{folder}' has a vocabulary of {len(tokenizer)} tokens of which 1 are not the baseline's" in message
    assert "give the baseline that it was fine-tuned from" in message


def test_a_model_without_a_tokenizer(arguments: Arguments, nothing_is_loaded: None, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "bare")
    message = error_of({**arguments, "--model": str(tmp_path / "bare")})
    assert f"model '{tmp_path / 'bare'}' has no tokenizer" in message


def test_missing_data_of_a_task(arguments: Arguments, nothing_is_loaded: None, tmp_path: Path) -> None:
    tasks = write_benchmark_tasks(tmp_path / "tasks")
    (tasks / "texts.jsonl").unlink()
    message = error_of({**arguments, "--include-path": str(tasks)})
    assert "task 'texts' cannot be loaded: FileNotFoundError" in message
    assert "texts.jsonl" in message and "the suite `offline` needs neither" in message


def file_in_its_place(folder: Path) -> None:
    folder.write_text("a file")


def somebodys_files(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (file_in_its_place, "is a file; name a folder."),
        (somebodys_files, "is not empty and holds no earlier report; name another folder."),
    ],
)
def test_output_folder(
    arguments: Arguments, nothing_is_loaded: None, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "out")
    assert error_of(arguments) == f"lopt-hf retention: error: output_dir='{tmp_path / 'out'}' {message}"


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("mine", "has a report.json that no command here wrote, which would be lost; name another folder."),
        ('{"baseline": "a year", "models": 3}', "has a report.json that no command here wrote, which would be lost;"),
        ("[1]", "has a report.json that no command here wrote, which would be lost; name another folder."),
        (
            '{"baseline": "b", "models": [], "settings": {"command": "lopt-hf compare --config grid.yaml"}}',
            "has a report.json of `lopt-hf compare`, not of `lopt-hf retention`; name another folder.",
        ),
        (
            '{"baseline": "b", "models": [], "settings": {"command": "lopt-hf retentions"}}',
            "has a report.json of `lopt-hf retentions`, not of `lopt-hf retention`; name another folder.",
        ),
    ],
)
def test_a_report_of_something_else_is_kept(
    arguments: Arguments, nothing_is_loaded: None, tmp_path: Path, report: str, message: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text(report)
    assert f"output_dir='{tmp_path / 'out'}' {message}" in error_of(arguments)
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == [report]


def test_changed_answers_of_somebody_else_are_kept(
    arguments: Arguments, nothing_is_loaded: None, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "flips.jsonl").write_text('{"mine": 1}\n')
    assert "is not empty and holds no earlier report; name another folder." in error_of(arguments)


def write_heldout(path: Path, number: int) -> str:
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}."} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_more_heldout_rows_than_there_are(arguments: Arguments, nothing_is_loaded: None, tmp_path: Path) -> None:
    heldout = write_heldout(tmp_path / "heldout.jsonl", 6)
    message = error_of({**arguments, "--heldout-data": heldout, "--num-heldout": "7"})
    assert f"num_heldout=7, but heldout_data={heldout} has only 6 rows; lower the one, or give more" in message


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def without_end(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def of_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "has no weights (adapter_model.safetensors); save or copy it again, whole."),
        (without_end, "cannot be loaded (SafetensorError: "),
        (of_more_layers, "lacks 9 of the weights that its config.json asks for, such as model.layers.4."),
    ],
)
def test_a_model_that_is_not_whole_is_told_before_the_baseline_is_measured(
    arguments: Arguments,
    models: SavedModels,
    nothing_is_loaded: None,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = shutil.copytree(models.adapter if damage is without_weights else models.tuned, tmp_path / "damaged")
    damage(folder)
    error = error_of({**arguments, "--model": [f"tuned={models.tuned}", str(folder)]})
    assert f"'{folder}' {message}" in error and "\n" not in error


def test_a_max_length_beyond_the_positions_is_told_before_tasks_are_loaded(
    arguments: Arguments, nothing_is_loaded: None, tmp_path: Path
) -> None:
    folder = save(make_model("gpt2"), tmp_path / "gpt2")
    changes: Arguments = {"--baseline": folder, "--model": folder, "--tasks": "nothing", "--max-length": "129"}
    message = error_of({**arguments, **changes})
    assert f"max_length=129 is more than the 128 positions of model '{folder}'; set it to 128 or less" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("doc_to_text: ", "doc_to_text: '{{qestion}}' #"),
            "cannot be loaded: UndefinedError: 'qestion' is undefined.",
        ),
        (("doc_to_text: ", "doc_to_text: '{{question' #"), "cannot be loaded: TemplateSyntaxError: "),
        (
            ("doc_to_text: ", "process_docs: !function own.nothing\ndoc_to_text: "),
            "cannot be loaded: it has no samples, as where its process_docs leaves none (IndexError: ",
        ),
        (
            ("doc_to_text: ", "process_docs: !function own.lacking\ndoc_to_text: '{{[question][part or 0]}}' #"),
            "a template of words cannot be filled in for every sample: ",
        ),
    ],
    ids=["a typo", "no end", "no rows", "in a later row"],
)
def test_mistakes_in_an_own_task(arguments: Arguments, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    tasks = write_benchmark_tasks(tmp_path / "tasks")
    own = "def nothing(docs): return docs.select([])\n"
    own += "def lacking(docs): return docs.map(lambda row, at: {'part': 7 if at else 0}, with_indices=True)\n"
    (tasks / "own.py").write_text(own)
    words = (tasks / "words.yaml").read_text()
    (tasks / "words.yaml").write_text(words.replace(*change))
    error = error_of({**arguments, "--include-path": str(tasks), "--tasks": "words"})
    assert message in error and "words" in error and "\n" not in error


def test_plots_that_cannot_be_drawn_are_told_before_anything_is_measured(
    arguments: Arguments, nothing_is_loaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'Plots need `matplotlib`: `pip install "lopt_hf[demo]"`' in error_of(arguments)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_a_plot_that_fails_takes_nothing_with_it(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is printed and written before."""

    def fail(report: Any) -> None:
        raise RuntimeError("no room to draw")

    monkeypatch.setitem(report_module.PLOTS, "deltas.png", fail)
    with pytest.raises(RuntimeError, match="no room to draw"):
        run(arguments, "--no-drift")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", "flips.jsonl"}
    assert (out / "report.md").read_text().strip() in capsys.readouterr().out


@pytest.mark.parametrize("full_at", ["texts", "drift", "report.json", "report.md", "flips"])
def test_full_disk(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str) -> None:
    """One line; nothing half written is left; when there is room, the same command ends as if nothing had been."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name.startswith(full_at):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        message = error_of(arguments)
    assert message.startswith("lopt-hf retention: the disk is full: ")
    assert message.endswith("What was finished is kept; free some room and run it again.")
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    assert [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("sums")]
    run(arguments)
    assert (tmp_path / "out" / "flips.jsonl").is_file()


def test_full_disk_while_answering(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of single answers is SQLite's, which has an error of its own."""

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(CacheHook, "add_partial", full)
        message = error_of(arguments)
    assert message.startswith("lopt-hf retention: the disk is full: ")
    assert "single answers cannot be kept: database or disk is full" in message
    run(arguments)
    assert (tmp_path / "out" / "report.json").is_file()


def test_an_adapter_that_is_no_change_of_weights(
    arguments: Arguments, models: SavedModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt's tokens: the report is written, and only what compares weights leaves that model out."""
    model = make_model(vocab_size=len(VOCABULARY) + 8)
    model.name_or_path = models.base
    prompt = str(tmp_path / "prompt")
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(prompt)
    run({**arguments, "--model": [f"tuned={models.tuned}", f"prompt={prompt}"]})
    tuned, prompted = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
    assert tuned["drift"] and tuned["similarity"] and prompted["deltas"]
    assert prompted["drift"] == prompted["similarity"] == {}
    reason = f"the adapter '{prompt}' (PROMPT_TUNING) cannot be merged into its base's weights; give one that can"
    assert f"prompt: its drift is left out: {reason}" in caplog.text
    assert f"prompt: the similarity of its layers is left out: {reason}" in caplog.text


def test_an_adapters_base_can_be_given(arguments: Arguments, models: SavedModels, tmp_path: Path) -> None:
    """The adapter gives what it gave with the base that it names."""
    run({**arguments, "--model": models.adapter})
    expected = json.loads((tmp_path / "out" / "report.json").read_text())["models"][0]["deltas"]
    adapter = shutil.copytree(models.adapter, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    moved = {**arguments, "--model": str(adapter), "--output-dir": str(tmp_path / "again")}
    run({**moved, "--adapter-base": models.base})
    assert json.loads((tmp_path / "again" / "report.json").read_text())["models"][0]["deltas"] == expected
    baseline = {**moved, "--baseline": str(adapter), "--model": models.merged, "--tasks": "sums"}
    assert "give the base with --adapter-base" in error_of(baseline)
    run({**baseline, "--adapter-base": models.base})
    (delta, *_) = json.loads((tmp_path / "again" / "report.json").read_text())["models"][0]["deltas"]
    assert delta["delta"] == 0
    del baseline["--model"], baseline["--output-dir"]
    run({**baseline, "--adapter-base": models.base, "--detect": "1"})
