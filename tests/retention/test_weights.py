"""Checkpoints that are not whole are refused by name, before anything is asked of a model with newly drawn weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopt_hf.retention.evaluation import EvaluationSettings, load_language_model
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.weights import check_files, load_adapter, load_full, load_pair
from tests.retention.conftest import SavedModels, save
from tests.tiny import make_model

WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / (WEIGHTS if (folder / WEIGHTS).is_file() else "adapter_model.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def set_config(folder: Path, **values: int) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def of_compiled_model(folder: Path) -> None:
    rewrite(folder, lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()})


def fewer_layers(folder: Path) -> None:
    set_config(folder, num_hidden_layers=json.loads((folder / "config.json").read_text())["num_hidden_layers"] + 2)


def other_shapes(folder: Path) -> None:
    set_config(folder, intermediate_size=40)


def cut_off(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def cut_off_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_compiled_model, r"lacks 39 of the weights .* such as lm_head.weight \(it has _orig_mod.lm_head.weight, "),
        (
            fewer_layers,
            "lacks 18 of the weights that its config.json asks for, such as model.layers.4.input_layernorm",
        ),
        (
            other_shapes,
            r"mlp.down_proj.weight is of shape \[32, 48\] in its files and of \[32, 40\] by its config.json",
        ),
        (
            cut_off,
            r"cannot be loaded \(SafetensorError: .*; if its files are damaged or cut off, save or copy it again",
        ),
        (cut_off_pickle, "pytorch_model.bin|cannot be loaded"),
    ],
)
def test_a_checkpoint_that_is_not_whole(
    models: SavedModels,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    """By its files alone, and wherever it is loaded; without the table that transformers prints."""
    folder = shutil.copytree(models.tuned, tmp_path / "model")
    damage(folder)
    reference = ModelReference.find(str(folder))
    base = ModelReference.find(models.base)
    for load in (
        lambda: check_files(reference),
        lambda: load_language_model(reference, EvaluationSettings()),
        lambda: load_pair(base, reference),
    ):
        with pytest.raises((ValueError, OSError), match=message) as raised:
            load()
        assert damage is cut_off_pickle or f"model '{folder}'" in str(raised.value)
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_not_stored_is_not_missing(tmp_path: Path, family: str) -> None:
    """A head that shares the embeddings' weights, and buffers."""
    model = make_model(family, tie_word_embeddings=True)
    reference = ModelReference.find(save(model, tmp_path / "model"))
    assert "lm_head.weight" not in load_file(tmp_path / "model" / WEIGHTS)
    check_files(reference)
    loaded = load_full(reference)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in loaded.state_dict().items())


def test_weights_that_are_left_aside_are_told_in_one_line(
    models: SavedModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(models.tuned, tmp_path / "model")
    rewrite(
        folder, lambda weights: {**weights, "value_head.bias": torch.zeros(1), "value_head.weight": torch.zeros(2)}
    )
    reference = ModelReference.find(str(folder))
    check_files(reference)
    load_language_model(reference, EvaluationSettings())
    (line,) = [record.getMessage() for record in caplog.records if "value_head" in record.getMessage()]
    assert line == (
        f"model '{folder}' has 2 weights that its config.json does not ask for, such as value_head.bias; they are "
        "left aside."
    )


def test_an_adapter_that_is_not_whole(models: SavedModels, tmp_path: Path) -> None:
    folder = shutil.copytree(models.adapter, tmp_path / "adapter")
    reference = ModelReference.find(str(folder))
    check_files(reference)
    rewrite(folder, lambda weights: dict(sorted(weights.items())[1:]))
    for load in (
        lambda: load_adapter(load_full(reference), reference),
        lambda: load_language_model(reference, EvaluationSettings()),
    ):
        with pytest.raises(ValueError, match=f"the adapter '{folder}' lacks weights, .*lora_A"):
            load()
    rewrite(folder, lambda weights: {name: weight[:, :1].contiguous() for name, weight in weights.items()})
    with pytest.raises(ValueError, match=rf"the adapter '{folder}' cannot be loaded \(RuntimeError: .*size mismatch"):
        load_adapter(load_full(reference), reference)
    (folder / "adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=f"the adapter '{folder}' cannot be loaded .SafetensorError"):
        check_files(reference)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=f"the adapter '{folder}' has no weights .adapter_model.safetensors.; save or"
    ):
        check_files(reference)
    for text, message in (("{", "is damaged"), ("{}", "names no peft_type")):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"adapter_config.json {message}.*; save or copy the adapter again"):
            ModelReference.find(str(folder))


def test_a_device_without_room_is_no_fault_of_the_files(models: SavedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        load_full(ModelReference.find(models.base), Full)
