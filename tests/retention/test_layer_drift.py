"""Drift is where weights changed, as much as they changed, and the same for an adapter and the merged model."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lopt_hf.retention.layer_drift import drift_by_layer, layer_drift
from lopt_hf.retention.references import ModelReference
from tests.retention.conftest import SavedModels, moved, save
from tests.tiny import make_model

PARTS = ["embeddings", "0", "1", "2", "3", "rest"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3_moe"])
def test_an_untouched_model_has_not_moved(family: str) -> None:
    assert drift_by_layer(make_model(family), make_model(family)) == dict.fromkeys(PARTS, 0.0)


def test_only_the_changed_layer_moves() -> None:
    """By as much as its weights were scaled."""
    model = make_model()
    with torch.no_grad():
        for weight in model.model.layers[2].parameters():
            weight *= 1.25
    drift = drift_by_layer(make_model(), model)
    assert drift == {**dict.fromkeys(PARTS, 0.0), "2": pytest.approx(0.25)}


def test_every_part_moves() -> None:
    base = make_model(tie_word_embeddings=False)
    assert all(value > 0.01 for value in drift_by_layer(base, moved(base)).values())


@pytest.mark.parametrize("changed", ["embeddings", "rest"])
def test_an_untied_head_against_a_tied_baseline(changed: str) -> None:
    """Unmoved if its values are the embeddings'; and each of the two moves alone."""
    base, model = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=False)
    model.load_state_dict(base.state_dict())
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert drift_by_layer(base, model) == dict.fromkeys(PARTS, 0.0)
    with torch.no_grad():
        (model.lm_head if changed == "rest" else model.model.embed_tokens).weight += 1
    assert [part for part, value in drift_by_layer(base, model).items() if value] == [changed]


def test_a_tied_head_moves_with_the_embeddings() -> None:
    base, model = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
    assert [part for part, value in drift_by_layer(base, model).items() if value] == ["embeddings", "rest"]


def test_an_adapter_moves_as_the_merged_model(models: SavedModels) -> None:
    base, adapter, merged = (ModelReference.find(name) for name in (models.base, models.adapter, models.merged))
    drift = layer_drift(base, adapter)
    assert drift == pytest.approx(layer_drift(base, merged), rel=1e-5)
    assert [part for part, value in drift.items() if value > 1e-3] == ["0", "1", "2", "3"]
    assert layer_drift(base, base) == dict.fromkeys(PARTS, 0.0)


def test_rounding_is_no_drift(tmp_path: Path) -> None:
    """A model in bf16 of which one layer was trained, against its baseline in fp32."""
    base = make_model()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in tuned.model.layers[2].parameters():
            weight *= 1.25
    folders = save(base, tmp_path / "base"), save(tuned.bfloat16(), tmp_path / "tuned")
    drift = layer_drift(*(ModelReference.find(folder) for folder in folders))
    assert drift == {**dict.fromkeys(PARTS, 0.0), "2": pytest.approx(0.25, rel=1e-2)}


def test_an_adapter_of_a_rounded_base(models: SavedModels, tmp_path: Path) -> None:
    """What the adapter adds is not rounded; where it adds nothing, nothing moved."""
    base = save(AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.bfloat16), tmp_path / "base")
    folder = shutil.copytree(models.adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    adapter, baseline = ModelReference.find(str(folder)), ModelReference.find(models.base)
    drift = layer_drift(baseline, adapter)
    assert drift["embeddings"] == drift["rest"] == 0
    assert drift == pytest.approx(layer_drift(baseline, ModelReference.find(models.adapter)), rel=1e-3)


def test_an_adapter_of_one_layer_moves_it_alone() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    model = get_peft_model(make_model(), config).merge_and_unload()
    assert [part for part, value in drift_by_layer(make_model(), model).items() if value] == ["1"]


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ({"num_hidden_layers": 5}, "the baseline's rest and the model's 4 differ"),
        ({"num_hidden_layers": 3}, "the baseline's 3 and the model's rest differ"),
        ({"vocab_size": 96}, "the baseline's embeddings and the model's embeddings differ"),
        ({"intermediate_size": 40}, "the baseline's 0 and the model's 0 differ"),
    ],
)
def test_other_architectures(other: dict[str, int], parts: str) -> None:
    with pytest.raises(ValueError, match=f"{parts} .*--no-drift"):
        drift_by_layer(make_model(), make_model(**other))
