"""The optimizer's step in the backward: the weights of the ordinary step, without the gradients of all at a time."""

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from lopt_hf.meters.gradient_bytes import GradientBytes
from lopt_hf.peers.step_in_backward import StepInBackward
from tests.peers.helpers import assert_equal, make_trainer
from tests.tiny import make_model


class Gradients(TrainerCallback):
    peak = 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.bytes = GradientBytes(model.parameters())
        self.bytes.__enter__()

    def on_step_end(self, *args, **kwargs):
        self.bytes.__exit__(None, None, None)
        self.peak = max(self.peak, self.bytes.peak)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": "adamw_torch"},
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["fused", "adamw_torch", "sgd", "adafactor", "decay and schedule", "reentrant", "not reentrant"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_are_those_of_the_ordinary_step(settings, tied, tmp_path):
    runs = []
    for name, callbacks in (("ordinary", []), ("in backward", [StepInBackward()])):
        model = make_model(tie_word_embeddings=tied)
        runs.append(make_trainer(tmp_path / name, *callbacks, model=model, max_grad_norm=0.0, max_steps=4, **settings))
        runs[-1].train()
    assert_equal(runs[0].model, runs[1].model)


def test_no_more_than_one_gradient_is_held(tmp_path):
    gradients = Gradients()
    trainer = make_trainer(tmp_path, StepInBackward(), gradients, max_grad_norm=0.0)
    trainer.train()
    assert gradients.peak == max(parameter.nbytes for parameter in trainer.model.parameters())


def test_resumed_run(tmp_path):
    settings = {"max_grad_norm": 0.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, StepInBackward(), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, StepInBackward(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(whole.model, resumed.model)


def test_adapters(tmp_path):
    peft = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True)
    trainer = make_trainer(tmp_path, StepInBackward(), peft=peft, max_grad_norm=0.0)
    trainer.train()
    assert any(p.any() for name, p in trainer.model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 clips the norm of all gradients together.*; set it to 0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 keeps gradients.*; set it to 1"),
        ({"optim": "lomo"}, "optim='lomo' steps in the backward by itself"),
    ],
)
def test_runs_that_do_not_suit(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, StepInBackward(), **{"max_grad_norm": 0.0, **changes})
