"""`local_step=True` ends where the deferred step does, bit for bit, with one block's gradients in memory at a time."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from lopt_hf import LoPTTrainer
from lopt_hf.local.stepping import stepping_only
from tests.tiny import FAMILIES, make_model
from tests.trainers.helpers import make_trainer, snapshot
from tests.trainers.test_resume import CLOCK, assert_equal, final_state

# Clips at every step, so that a norm over other parameters would show, and moves the rate from step to step.
SETTINGS = {"num_blocks": 3, "max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 4}


def run(output_dir: Path, family: str = "llama", lora: bool = False, **settings) -> LoPTTrainer:
    adapter = {"peft_config": LoraConfig(target_modules="all-linear", init_lora_weights=False)} if lora else None
    trainer = make_trainer(output_dir, make_model(family), adapter, **{**SETTINGS, **settings})
    trainer.train()
    return trainer


def end(trainer: LoPTTrainer) -> dict:
    log = [{k: v for k, v in row.items() if not any(c in k for c in CLOCK)} for row in trainer.state.log_history]
    optimizer = trainer.optimizer.state_dict()
    return {"weights": snapshot(trainer), "optimizer": optimizer, "log": log}


def assert_local_step_changes_nothing(tmp_path: Path, **settings) -> None:
    local, deferred = (end(run(tmp_path / str(on), local_step=on, **settings)) for on in (True, False))
    assert "grad_norm" in local["log"][0] and "local_loss/block_0" in local["log"][0]
    assert_equal(local, deferred)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    assert_local_step_changes_nothing(tmp_path, family=family)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": True},
        {"gradient_accumulation_steps": 3},
        {"local_update_interval": 2},
        {"local_update_interval": 2, "gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
        {"early_learning_rate": 1e-4, "weight_decay": 0.1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
        {"optim": "adafactor"},
        {"optim": "sgd", "gradient_accumulation_steps": 2},
        {"num_blocks": 2, "local_objective": "readout"},
        {"family": "gpt2", "tied_embeddings": "freeze"},
        {"clip_scope": "part"},
        {"clip_scope": "part", "family": "gpt2", "gradient_accumulation_steps": 2, "local_update_interval": 2},
        {"clip_scope": "part", "lora": True},
        {"clip_scope": "part", "gradient_checkpointing": True, "max_grad_norm": 0.0, "num_blocks": 2},
        {"clip_scope": "part", "family": "gpt2", "tied_embeddings": "freeze", "early_learning_rate": 1e-4},
        {"clip_scope": "part", "kind": "dpo"},
        {"clip_scope": "part", "kind": "grpo", "gradient_accumulation_steps": 2},
        {"kind": "dpo"},
        {"kind": "dpo", "lora": True, "gradient_accumulation_steps": 2},
        {"kind": "grpo", "gradient_accumulation_steps": 2},
        {"kind": "grpo", "num_iterations": 2},
        {"num_train_epochs": 2, "max_steps": -1, "gradient_accumulation_steps": 3},  # an epoch's last step is short
    ],
    ids=lambda settings: "-".join(map(str, settings.items()))[:60],
)
def test_every_option(tmp_path, settings):
    assert_local_step_changes_nothing(tmp_path, **settings)


def test_gradients_are_gone_when_the_next_block_starts(tmp_path):
    """Block j's are there when its own backward is done, and None when block j+1's forward starts."""
    trainer = make_trainer(tmp_path, make_model("gpt2"), **SETTINGS, local_step=True)
    groups, alive = trainer.learner.parameters_to_learn(), []
    held = lambda: [any(p.grad is not None for p in group) for group in groups]  # noqa: E731

    for block in trainer.blocks:
        trainer.stack.layers[block.start].register_forward_pre_hook(lambda *_: alive.append(held()))

    class AtTheEnd(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            alive.append(held())

    trainer.add_callback(AtTheEnd())
    trainer.train()
    none = [False, False, False]
    assert alive == [none, none, none, [False, False, True]] * 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_parts_of_a_block_are_not_in_memory_together(tmp_path, family):
    """The LM head's gradient is gone when its block's layers get theirs, an early block's before the embeddings'."""
    trainer = make_trainer(tmp_path, make_model(family), **SETTINGS, local_step=True, clip_scope="part")
    groups = trainer.learner.groups()
    assert [(group.block, len(group.parameters) > 0) for group in groups] == [
        (0, True), (0, True), (1, True), (1, False), (2, True), (2, True)
    ]  # fmt: skip
    together = set()

    def look(index, gradient):
        together.update((index, i) for i, g in enumerate(groups) if any(p.grad is not None for p in g.parameters))

    for index, group in enumerate(groups):
        for parameter in group.parameters:
            parameter.register_hook(partial(look, index))
    trainer.train()
    assert together == {(0, 0), (2, 2), (4, 4), (5, 5)} | ({(1, 1)} if len(groups[1].parameters) > 1 else set())


def test_parts_are_clipped_apart(tmp_path):
    trainer = make_trainer(tmp_path, **{**SETTINGS, "max_grad_norm": 1e-4}, clip_scope="part")
    norms = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            groups = [[p.grad for p in group.parameters] for group in trainer.learner.groups() if group.parameters]
            norms.extend(torch.nn.utils.get_total_norm(gradients).item() for gradients in groups)

    trainer.add_callback(Watch())
    trainer.train()
    assert norms == pytest.approx([1e-4] * 5 * 4, rel=0.02)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_whoever_has_checkpointing_on_is_told(tmp_path, caplog, checkpointing):
    make_trainer(tmp_path, **{**SETTINGS, "activation_checkpointing": checkpointing})
    assert ("activation_checkpointing=True (TRL's default) leaves few" in caplog.text) is checkpointing


def test_gradients_stay_while_they_accumulate(tmp_path, caplog):
    trainer = make_trainer(tmp_path, **SETTINGS, gradient_accumulation_steps=2, local_step=True)
    assert "local_step=True saves no memory with gradient_accumulation_steps=2" in caplog.text
    first, alive = trainer.learner.parameters_to_learn()[0], []
    trainer.stack.layers[trainer.blocks[1].start].register_forward_pre_hook(
        lambda *_: alive.append(all(p.grad is not None for p in first))
    )
    trainer.train()
    assert alive == [True, False] * 4


@pytest.mark.parametrize("resumed_with", [True, False])
def test_a_run_goes_on_with_the_other_setting(tmp_path, resumed_with):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "weight_decay": 0.1}
    run(tmp_path / "whole", local_step=resumed_with, **settings)
    trainer = make_trainer(tmp_path / "changed", **{**SETTINGS, **settings, "local_step": not resumed_with})

    class StopAt4(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer.add_callback(StopAt4())
    trainer.train()
    changed = make_trainer(tmp_path / "changed", **{**SETTINGS, **settings, "local_step": resumed_with})
    changed.train(resume_from_checkpoint=True)
    whole, resumed = (final_state(tmp_path / name) for name in ("whole", "changed"))
    assert_equal(whole, resumed)


def test_optimizer_of_the_users_own(tmp_path):
    ends = []
    for on in (True, False):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        kwargs = {"optimizers": (optimizer, torch.optim.lr_scheduler.LinearLR(optimizer))}
        trainer = make_trainer(tmp_path / str(on), model, kwargs, **SETTINGS, local_step=on)
        trainer.train()
        ends.append(end(trainer))
    assert_equal(*ends)


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as schedule-free optimizers do, and slows down with them."""

    def step(self, closure=None):
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] /= group["count"]
        loss = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss


def test_an_optimizer_that_counts_its_steps_counts_one_for_all_blocks(tmp_path):
    ends = []
    for on in (True, False):
        model = make_model()
        kwargs = {"optimizers": (Counting(model.parameters(), lr=0.1), None)}
        trainer = make_trainer(tmp_path / str(on), model, kwargs, **SETTINGS, local_step=on)
        trainer.train()
        assert [group["count"] for group in trainer.optimizer.param_groups] == [4]
        ends.append(end(trainer))
    assert_equal(*ends)


def test_stepping_only_puts_everything_back_after_an_error():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for parameter in parameters[:2]:
        parameter.grad = torch.ones(2)
    groups, gradients = optimizer.param_groups, [parameter.grad for parameter in parameters]
    with pytest.raises(KeyboardInterrupt), stepping_only(optimizer, parameters[:1]):
        assert parameters[1].grad is None
        optimizer.step()
        raise KeyboardInterrupt
    assert optimizer.param_groups is groups
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, gradients, strict=True))
    assert [parameter[0].item() for parameter in parameters] == [0.0, 1.0, 1.0]


def test_a_second_forward_in_one_micro_batch_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, **SETTINGS, local_step=True)
    forward = trainer.model.forward
    trainer.model.forward = lambda **inputs: forward(**inputs) and forward(**inputs)
    with pytest.raises(RuntimeError, match="block 0 runs forward .* a second time.*set local_step to False"):
        trainer.train()


def test_a_gradient_that_turns_nan_stops_the_run_before_its_block_steps(tmp_path):
    trainer = make_trainer(tmp_path, **SETTINGS, local_step=True)
    weight = next(trainer.stack.layers[trainer.blocks[1].start].parameters())
    weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        FloatingPointError, match="grad_norm of block 1 is nan at step 1.*the weights that have not stepped yet"
    ):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    weight._backward_hooks.clear()
    trainer.train()  # nothing is left of the step that failed
    assert trainer.state.global_step == 4
