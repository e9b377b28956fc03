"""What a stage writes into a checkpoint, and what it says of one that it cannot go on from."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from lopt_hf.pipeline.runtime import stage_checkpoint
from lopt_hf.pipeline.runtime.checkpoint import Manifest
from lopt_hf.pipeline.runtime.trainer import PipelineTrainer
from tests.tiny import make_model

FIXTURE = Path(__file__).parents[2] / "fixtures/resume_before_local_learner"
CHECKPOINT = FIXTURE / "pipeline/checkpoint-3"


class Scaler:
    """Of fp16's gradients, which need a GPU."""

    def __init__(self, scale):
        self.scale = scale

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = state["scale"]


def save_stage(monkeypatch, tmp_path, scaler):
    for name in ("save_weights", "save_optimizer_state", "_state_to_save", "_stepped_parameters"):
        monkeypatch.setattr(stage_checkpoint, name, lambda *args: {})
    nothing = SimpleNamespace(state_dict=dict)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(scaler=scaler),
        args=SimpleNamespace(device=torch.device("cpu")),
        callback_handler=SimpleNamespace(callbacks=[]),
        control=None,
        lr_scheduler=nothing,
        model=None,
        optimizer=None,
        state=SimpleNamespace(save_to_json=lambda path: None),
        store_flos=lambda: None,
        _save_local_state=lambda *args: None,
        _save_rng_state=lambda folder: None,
    )
    stage_checkpoint._save_stage(trainer, tmp_path / "stage-0", tmp_path / "checkpoint-2")


@pytest.mark.parametrize("scaler", [Scaler(512.0), None], ids=["fp16", "without"])
def test_the_scale_of_fp16s_gradients_is_where_the_parent_looks_for_it(tmp_path, monkeypatch, scaler):
    save_stage(monkeypatch, tmp_path, scaler)
    resumed = Scaler(65536.0)
    asked = SimpleNamespace(accelerator=SimpleNamespace(scaler=resumed), args=SimpleNamespace(device="cpu"))
    Trainer._load_scaler(asked, str(tmp_path / "stage-0"))
    assert resumed.scale == (65536.0 if scaler is None else 512.0)


@pytest.fixture
def trainer():
    """Of the model that the run started from."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURE / "start/model")
    return SimpleNamespace(model=model, world=SimpleNamespace(replica=0))


def test_a_whole_checkpoint_passes(trainer):
    stage_checkpoint.check_parts(trainer, Manifest(CHECKPOINT))


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "scheduler.pt", "trainer_state.json"]
)
def test_a_damaged_file_of_any_stage_is_named(tmp_path, trainer, name):
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint-3")
    path = checkpoint / "stage-1" / name
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ValueError, match=f"stage-1'?: {name} is damaged"):
        stage_checkpoint.check_parts(trainer, Manifest(checkpoint))
    path.unlink()
    with pytest.raises(ValueError, match=f"stage-1' has no {name}"):
        stage_checkpoint.check_parts(trainer, Manifest(checkpoint))


def test_a_checkpoint_of_another_width_is_of_another_model(trainer):
    trainer.model = make_model()
    with pytest.raises(ValueError, match="is of another model: "):
        stage_checkpoint.check_parts(trainer, Manifest(CHECKPOINT))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_missing_random_state_is_told_as_in_one_process(tmp_path, monkeypatch, caplog, is_there):
    for name in ("load_stage_weights", "load_replica_state"):
        monkeypatch.setattr(stage_checkpoint, name, lambda *args: {})
    if is_there:
        (tmp_path / "rng_state.pth").touch()
    trainer = object.__new__(PipelineTrainer)
    trainer.args, trainer.world = SimpleNamespace(world_size=1), SimpleNamespace(replica=0, store=None)
    trainer._manifest = trainer._resumed = SimpleNamespace()
    trainer._load_from_checkpoint(str(tmp_path))
    assert ("has no rng_state.pth, as when another number of processes" in caplog.text) != is_there


def test_what_was_in_flight_is_damaged(tmp_path):
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint-3")
    (checkpoint / "in-flight").mkdir()
    (checkpoint / "in-flight/stage-0-0.pt").write_bytes(b"PK")
    trainer = SimpleNamespace(plan=SimpleNamespace(name="stage-0"), world=SimpleNamespace(replica=0))
    with pytest.raises(ValueError, match="in-flight/stage-0-0.pt is damaged"):
        stage_checkpoint.load_in_flight(trainer, Manifest(checkpoint))


def test_a_damaged_manifest(tmp_path):
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": []})[:-3])
    with pytest.raises(ValueError, match="pipeline.json is damaged"):
        Manifest(tmp_path)
