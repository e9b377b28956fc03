"""What went wrong without a word, or with a trace, when the trainers were used hard."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM, TrainerCallback

from lopt_hf import LoPTConfig, LoPTTrainer
from lopt_hf.common.locks import run_lock
from lopt_hf.local.objectives import ReconstructionObjective
from lopt_hf.scripts import sft
from tests.tiny import make_model
from tests.trainers.helpers import kind_kwargs, make_trainer, training_args

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.mark.parametrize(
    "adapter",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        LoraConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 1]),
    ],
    ids=["prompt tuning", "LoRA in the first block"],
)
def test_a_run_in_which_nothing_learns_the_task_is_refused(tmp_path, adapter):
    with pytest.raises(ValueError, match="nothing would learn the task"):
        make_trainer(tmp_path, make_model(), {"peft_config": adapter})


def test_early_adapters_learn_where_the_task_reaches_them(tmp_path):
    adapter = LoraConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 1], init_lora_weights=False)
    settings = {"local_objective": "none", "task_reach": [1, 2]}
    trainer = make_trainer(tmp_path, make_model(), {"peft_config": adapter}, **settings)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=" and ".join)
def test_an_adapter_that_ties_what_is_untied_is_refused(tmp_path, modules):
    adapter = LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=modules, ensure_weight_tying=True)
    with pytest.raises(ValueError, match="ensure_weight_tying=True makes one weight .* tied_embeddings to 'freeze'"):
        make_trainer(tmp_path, make_model(tie_word_embeddings=True), {"peft_config": adapter})
    trainer = make_trainer(
        tmp_path, make_model(tie_word_embeddings=True), {"peft_config": adapter}, tied_embeddings="freeze"
    )
    assert trainer.train().global_step == 3


def test_an_objective_that_is_passed_and_left_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="local_objective='none' leaves out ReconstructionObjective"):
        make_trainer(tmp_path, None, {"local_objective": ReconstructionObjective()}, local_objective="none")


@pytest.mark.parametrize("reach", [2, [1, 2]])
def test_local_losses_are_logged_where_the_task_reaches_their_block(tmp_path, reach):
    trainer = make_trainer(tmp_path, task_reach=reach)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3 and all(log["local_loss/block_0"] > 0 for log in logs)


def test_a_smaller_batch_after_one_that_did_not_fit_steps_block_by_block(tmp_path, monkeypatch):
    """`auto_find_batch_size` comes again where a block has stepped and the one behind has not."""
    trainer = make_trainer(tmp_path, auto_find_batch_size=True, local_step=True, per_device_train_batch_size=8)
    layer, fails = trainer.stack.layers[-1], iter([True])

    def run_out(*_):
        if next(fails, False):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    layer.register_forward_pre_hook(run_out)
    assert trainer.train().global_step == 3 and trainer._train_batch_size < 8


def test_a_compiled_model_runs_no_block_again(tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "task_reach": 2}
    with pytest.raises(ValueError, match="reach_recompute=True does not work with torch_compile=True"):
        make_trainer(tmp_path, **settings)


def test_compilation_that_accelerate_was_asked_for_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(ValueError, match="reach_recompute=True does not work with torch_compile=True"):
        LoPTConfig(str(tmp_path), task_reach=2)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert not LoPTConfig(str(tmp_path), task_reach=2).run_facts.is_compiled


def test_layers_that_are_left_out_at_random_are_refused(tmp_path):
    config = OPTConfig(
        vocab_size=64, hidden_size=8, ffn_dim=16, num_hidden_layers=4, num_attention_heads=2, layerdrop=0.5
    )
    with pytest.raises(ValueError, match=r"leaves out layers at random .layerdrop=0.5.*set it to 0"):
        make_trainer(tmp_path, OPTForCausalLM(config))


def test_a_failed_resume_leaves_nothing_behind(tmp_path, monkeypatch):
    make_trainer(tmp_path / "one", save_strategy="steps", save_steps=1, max_steps=3, logging_steps=2).train()
    trainer = make_trainer(tmp_path / "two")
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(trainer, "_prepare_for_training", lambda *args: 1 / 0)
        trainer.train(resume_from_checkpoint=str(tmp_path / "one/checkpoint-3"))
    trainer.train()
    fresh = make_trainer(tmp_path / "three")
    fresh.train()
    one, other = ([log for log in t.state.log_history if "loss" in log] for t in (trainer, fresh))
    assert one[0]["num_tokens"] == other[0]["num_tokens"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, **{**SAVING, "max_steps": 2}).train()
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_width(path: Path) -> None:
    save_file({name: torch.zeros(3, 3) for name in load_file(path)}, path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("optimizer.pt", Path.unlink, "has no optimizer.pt"),
        ("scheduler.pt", Path.unlink, "has no scheduler.pt"),
        ("model.safetensors", Path.unlink, "has no model.safetensors"),
        ("trainer_state.json", Path.unlink, "has no trainer_state.json"),
        ("local_heads.safetensors", Path.unlink, "has no local_heads.safetensors"),
        ("local_learning.json", Path.unlink, "has no local_learning.json"),
        ("optimizer.pt", truncate, "optimizer.pt is damaged"),
        ("model.safetensors", truncate, "model.safetensors is damaged"),
        ("trainer_state.json", truncate, "trainer_state.json is damaged"),
        ("local_learning.json", truncate, "local_learning.json is damaged"),
        ("model.safetensors", other_width, "is of another model: "),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, saved, name, damage, message):
    shutil.copytree(saved, tmp_path / "run")
    damage(tmp_path / "run/checkpoint-2" / name)
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path / "run", **SAVING).train(resume_from_checkpoint=True)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_without_random_state_is_warned_of(tmp_path, saved, caplog):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/checkpoint-2/rng_state.pth").unlink()
    make_trainer(tmp_path / "run", **SAVING).train(resume_from_checkpoint=True)
    assert any("has no rng_state.pth" in record.message for record in caplog.records)


def test_a_resumed_run_reports_the_mean_loss_of_its_own_steps(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine"}
    every = make_trainer(tmp_path / "every", **{**settings, "logging_steps": 1})
    every.train()
    losses = [row["loss"] for row in every.state.log_history if "loss" in row]

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    make_trainer(tmp_path / "part", None, {"callbacks": [Stop()]}, **settings, logging_steps=3).train()
    resumed = make_trainer(tmp_path / "part", **settings, logging_steps=3).train(resume_from_checkpoint=True)
    assert resumed.training_loss == pytest.approx(sum(losses[4:]) / 4, rel=1e-3)


@pytest.mark.parametrize("reach", [1, 2])
def test_neftunes_noise_is_not_reconstructed(tmp_path, monkeypatch, reach):
    """The target of the first block is what the embeddings give without it, whatever the block was given."""
    targets = []
    original = ReconstructionObjective.__call__

    def record(self, head, output_BTD, input_BTD, batch):
        targets.append((input_BTD, batch.inputs["input_ids"]))
        return original(self, head, output_BTD, input_BTD, batch)

    monkeypatch.setattr(ReconstructionObjective, "__call__", record)
    trainer = make_trainer(tmp_path, neftune_noise_alpha=50.0, max_steps=1, task_reach=reach)
    weight = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    (target_BTD, tokens_BT), *others = targets
    assert torch.equal(target_BTD, weight[tokens_BT]) and not others


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": -1e-4},
        {"max_grad_norm": float("nan")},
        {"max_grad_norm": -1.0},
        {"max_length": -5},
        {"per_device_train_batch_size": 0},
        {"gradient_accumulation_steps": 0},
    ],
    ids=str,
)
def test_numbers_that_mean_nothing_are_refused(tmp_path, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        LoPTConfig(str(tmp_path), **settings)


def test_a_state_of_another_form_is_named(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/checkpoint-2/local_learning.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(ValueError, match=r"local_learning.json is damaged"):
        make_trainer(tmp_path / "run", **SAVING).train(resume_from_checkpoint=True)


def test_a_second_run_in_a_folder_is_refused_while_the_first_trains(tmp_path):
    class StartAnother(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                with pytest.raises(ValueError, match=rf"used by another run, process {os.getpid()};"):
                    make_trainer(tmp_path, max_steps=1).train()

    trainer = make_trainer(tmp_path, None, {"callbacks": [StartAnother()]})
    trainer.train()
    assert trainer.state.global_step == 3
    make_trainer(tmp_path, max_steps=1).train()  # it is free again
    assert not list(tmp_path.glob("_run*"))


def test_a_lock_ends_with_its_process(tmp_path):
    code = f"import os; from lopt_hf.common.locks import run_lock\nwith run_lock({str(tmp_path)!r}): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with run_lock(str(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FloatingPointError("loss is nan at step 3."), "loss is nan at step 3."),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "is full ("),
        (RuntimeError("PytorchStreamWriter failed: No space left on device\nmore"), "is full ("),
    ],
    ids=["diverged", "disk full", "disk full in torch"],
)
def test_a_run_that_fails_ends_with_one_line(tmp_path, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(LoPTTrainer, "train", fail)
    monkeypatch.setattr(sft, "prepare", lambda *args: (make_model(), kind_kwargs("sft", None, None)))
    arguments = {**training_args(tmp_path), "model_name_or_path": "m", "dataset_name": "d"}
    with pytest.raises(SystemExit) as ended:
        sft.main([part for name, value in arguments.items() for part in (f"--{name}", str(value))])
    assert message in str(ended.value) and "\n" not in str(ended.value)
