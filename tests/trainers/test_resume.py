"""A killed and resumed run ends where the uninterrupted one does, bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

from lopt_hf.trainers.checkpoint import STAGING_FOLDER
from lopt_hf.trainers.resume_state import STATE_FILE
from tests.forkserver import CONTEXT
from tests.tiny import make_model
from tests.trainers.helpers import KINDS, make_trainer
from tests.trainers.resume_worker import make_resumable_trainer, run_until_killed

CLOCK = ("runtime", "per_second", "train_loss", "step_time")  # of this process, not of the run


def final_state(output_dir: Path) -> dict:
    last = output_dir / "checkpoint-8"
    log_history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {
        "weights": load_file(last / "model.safetensors"),
        "heads": load_file(last / "local_heads.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "log": [{k: v for k, v in row.items() if not any(c in k for c in CLOCK)} for row in log_history],
    }


def assert_equal(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}/{i}")
    else:
        assert a == b, path


@pytest.mark.parametrize(
    ("kind", "num_blocks", "accumulation"),
    [("sft", 2, 1), ("sft", 2, 2), ("sft", 4, 1), ("sft", 4, 2), ("dpo", 2, 2), ("grpo", 2, 2)],
)
def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path, kind, num_blocks, accumulation):
    make_resumable_trainer(tmp_path / "whole", kind, num_blocks, accumulation).train()
    killed = CONTEXT.Process(target=run_until_killed, args=(tmp_path / "killed", kind, num_blocks, accumulation, 6))
    killed.start()
    killed.join(timeout=600)
    assert killed.exitcode == -signal.SIGKILL
    assert Path(get_last_checkpoint(tmp_path / "killed")).name == "checkpoint-4"
    make_resumable_trainer(tmp_path / "killed", kind, num_blocks, accumulation).train(resume_from_checkpoint=True)
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "killed")
    assert len(whole["log"]) >= 2 and "local_loss/block_0" in whole["log"][0]
    assert_equal(whole, resumed)


@pytest.mark.parametrize("fails_in", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save_local_state"])
def test_an_interrupted_save_leaves_the_previous_checkpoint_the_last(tmp_path, monkeypatch, fails_in):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, **settings)
    original = getattr(trainer, fails_in)

    def interrupted(*args):
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(trainer, fails_in, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert Path(get_last_checkpoint(tmp_path)).name == "checkpoint-2"
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert Path(get_last_checkpoint(tmp_path)).name == "checkpoint-4"
    assert not (tmp_path / STAGING_FOLDER).exists()


def test_old_checkpoints_are_rotated_and_the_best_is_kept(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.0,  # the first evaluation stays the best
        trainer_kwargs={"eval_dataset": make_trainer(tmp_path / "other").train_dataset},
    )
    trainer.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-1"] and trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_the_best_checkpoint_of_a_run_that_was_moved_is_kept_and_loaded(tmp_path):
    settings = dict(
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.0,  # the first evaluation stays the best
        trainer_kwargs={"eval_dataset": make_trainer(tmp_path / "other").train_dataset},
    )
    make_trainer(tmp_path / "a", max_steps=2, **settings).train()
    (tmp_path / "a").rename(tmp_path / "b")
    trainer = make_trainer(tmp_path / "b", max_steps=4, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in (tmp_path / "b").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    best = str(tmp_path / "b" / "checkpoint-1")
    written = json.loads((tmp_path / "b" / "checkpoint-4" / "trainer_state.json").read_text())
    assert trainer.state.best_model_checkpoint == best == written["best_model_checkpoint"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_other_block_settings_is_refused(kind, tmp_path):
    make_trainer(tmp_path, kind=kind, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="num_blocks=2, but this run has num_blocks=3"):
        make_trainer(tmp_path, kind=kind, num_blocks=3).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_loss_is_refused(tmp_path):
    make_trainer(tmp_path, kind="dpo", max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="is a checkpoint of LoPT-DPO, but this run is LoPT;.*pass the folder as"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match="not a checkpoint of this trainer"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_folder_with_another_runs_checkpoints_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="holds another run's checkpoints.*checkpoint-1"):
        make_trainer(tmp_path).train()


def state_of(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_weights_come_back_under_whatever_name_they_are_saved(family, tmp_path):
    """Experts are saved one by one, as the hub has them; transformers' own trainer would pass over them."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "tied_embeddings": "freeze"}

    def trainer():
        return make_trainer(tmp_path, make_model(family, tie_word_embeddings=True), **settings)

    whole = trainer()
    whole.train()
    expected = state_of(whole.model)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(state_of(resumed.model), expected)
    resumed.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    resumed._load_best_model()
    saved = type(whole.model).from_pretrained(tmp_path / "checkpoint-2")
    assert_equal(state_of(resumed.model), state_of(saved))
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in saved.state_dict().items())


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, make_model("mixtral"), **settings).train()
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.block_sparse_moe.gate.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of Mixtral.*model\.layers\.2\.mlp\.gate"):
        make_trainer(tmp_path, make_model("mixtral"), **settings).train(resume_from_checkpoint=True)


def test_an_adapter_with_a_name_of_its_own_resumes(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def trainer():
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        return make_trainer(tmp_path, get_peft_model(make_model(), config, adapter_name="policy"), **settings)

    torch.manual_seed(0)
    whole = trainer()
    whole.train()
    expected = state_of(whole.model)
    assert (tmp_path / "checkpoint-2" / "policy" / "adapter_model.safetensors").is_file()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(state_of(resumed.model), expected)
    shutil.rmtree(tmp_path / "checkpoint-2" / "policy")
    with pytest.raises(ValueError, match=r"has no policy/adapter_model\.safetensors"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_finished_run_that_is_resumed_trains_no_further(tmp_path):
    finished = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    finished.train()
    resumed = make_trainer(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    weights = dict(finished.model.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in resumed.model.named_parameters())
    assert resumed.state.global_step == 2
