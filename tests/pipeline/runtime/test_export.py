"""An export is there as a whole, or not at all."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lopt_hf.pipeline.runtime import export
from tests.distributed.pipeline_processes import assert_same_model, assert_succeeded, run, write_inputs
from tests.tiny import CHAT_TEMPLATE, make_model, make_tokenizer

FIXTURE = Path(__file__).parents[2] / "fixtures/resume_before_local_learner"
CHECKPOINT = FIXTURE / "pipeline/checkpoint-3"


@pytest.mark.parametrize("fails_in", ["AutoTokenizer.from_pretrained", "assemble_model"])
def test_one_that_fails_leaves_nothing_that_is_in_the_way_of_the_next(tmp_path, monkeypatch, fails_in):
    shutil.copytree(FIXTURE / "start/model", tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    loaded = []
    load_stage = export.load_stage
    monkeypatch.setattr(
        export, "load_stage", lambda *args, **kwargs: loaded.append(args) or load_stage(*args, **kwargs)
    )

    def fail(*args, **kwargs):
        raise OSError("no room")

    with monkeypatch.context() as broken:
        owner, _, name = f"lopt_hf.pipeline.runtime.export.{fails_in}".rpartition(".")
        broken.setattr(f"{owner}.{name}", fail)
        with pytest.raises(OSError, match="no room"):
            export.export_checkpoint(CHECKPOINT, tmp_path / "to/model", str(tmp_path / "start"))
    assert not list((tmp_path / "to").iterdir())
    assert bool(loaded) == (fails_in == "assemble_model"), "the tokenizer comes before the work"
    export.export_checkpoint(CHECKPOINT, tmp_path / "to/model", str(tmp_path / "start"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "to/model")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["model"]
    assert not list((tmp_path / "to/model").glob("incomplete-*"))


def test_a_run_with_a_template_and_options_of_its_own(tmp_path):
    """The exported model is the saved one in all files, and not the start in those beside the weights."""
    write_inputs(tmp_path)
    (tmp_path / "own.jinja").write_text(CHAT_TEMPLATE.replace("U:", "Q: "))
    settings = {"chat_template_path": tmp_path / "own.jinja", "eos_token": "!", "num_blocks": 2, "max_steps": 2}
    settings["model_init_kwargs"] = json.dumps({"attention_dropout": 0.1})
    assert_succeeded(*run(tmp_path, tmp_path / "out", ranks=2, **settings))
    export.export_checkpoint(tmp_path / "out/checkpoint-2", tmp_path / "exported")
    assert_same_model(tmp_path / "exported", tmp_path / "out")
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "exported" / name).read_text() == (tmp_path / "out" / name).read_text(), name
    tokenizer, config = (kind.from_pretrained(tmp_path / "exported") for kind in (AutoTokenizer, AutoConfig))
    eos = tokenizer.convert_tokens_to_ids("!")
    assert (tokenizer.eos_token_id, config.eos_token_id, config.attention_dropout) == (eos, eos, 0.1)
    assert "Q: " in tokenizer.chat_template


def test_a_checkpoint_without_them_takes_those_of_the_start(tmp_path):
    """One from before checkpoints held tokenizer and config."""
    assert not (CHECKPOINT / "stage-1/tokenizer_config.json").exists()
    shutil.copytree(FIXTURE / "start/model", tmp_path / "start")
    make_tokenizer(additional_special_tokens=["#"]).save_pretrained(tmp_path / "start")
    export.export_checkpoint(CHECKPOINT, tmp_path / "model", str(tmp_path / "start"))
    assert "#" in AutoTokenizer.from_pretrained(tmp_path / "model").all_special_tokens


@pytest.mark.parametrize("damage", ["truncated", "another model"])
def test_a_checkpoint_that_cannot_be_exported_is_one_line(tmp_path, damage):
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint-3")
    weights = checkpoint / "stage-0/weights.safetensors"
    sizes = {"hidden_size": 64} if damage == "another model" else {}
    make_model(**sizes).save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size - 100)
    message = "weights.safetensors is damaged" if damage == "truncated" else "is of another model"
    with pytest.raises(ValueError, match=message):
        export.export_checkpoint(checkpoint, tmp_path / "model", str(tmp_path / "start"))
    assert not (tmp_path / "model").exists()


def test_what_is_pushed_and_where(monkeypatch, tmp_path):
    """As the stock trainers: to the revision that is asked for, and without a run's own files."""
    pushed = {}
    monkeypatch.setattr(export, "upload_folder", lambda **given: pushed.update(given))
    args = SimpleNamespace(output_dir=str(tmp_path), hub_token=None, hub_revision="v2")
    export.push_model(SimpleNamespace(hub_model_id="me/model", args=args))
    assert pushed["revision"] == "v2"
    assert pushed["ignore_patterns"] == ["_*", "checkpoint-*", "incomplete-*"]
