"""The learner in a bare loop, without any trainer."""

import pytest
import torch

from lopt_hf.local.learner import LearnerEvents, LocalLearner
from lopt_hf.local.methods.lopt import LoPTArguments
from tests.tiny import make_model
from tests.trainers.helpers import make_trainer


def batch():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 80, (2, 12), generator=generator)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}


def gradients(model, learner):
    heads = {f"head.{name}": parameter.grad for name, parameter in learner.heads.named_parameters()}
    return {**{name: parameter.grad for name, parameter in model.named_parameters()}, **heads}


def run_micro_batch(model, learner):
    inputs = batch()
    model.train()
    with learner.micro_batch():
        with learner.forward(inputs, step=0):
            loss = learner.with_joint_loss(model(**inputs).loss)
        loss.backward()
        learner.after_backward()


@pytest.mark.parametrize("settings", [{"local_backward": "eager"}, {"local_backward": "joint"}, {"task_reach": 2}])
def test_a_bare_loop_has_the_gradients_of_the_trainer(tmp_path, settings):
    model = make_model()
    learner = LocalLearner(model, LoPTArguments(**settings), seed=42)
    run_micro_batch(model, learner)
    trainer = make_trainer(tmp_path, make_model(), seed=42, **settings)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch())
    # TRL sums the task loss chunk by chunk, which rounds in another way.
    expected = gradients(trainer.model, trainer.learner)
    torch.testing.assert_close(gradients(model, learner), expected, rtol=1e-5, atol=1e-7)


def test_a_step_of_a_block_frees_its_gradients_and_moves_nothing_else():
    model = make_model()
    made = []
    learner = LocalLearner(
        model, LoPTArguments(num_blocks=2, local_step=True), events=LearnerEvents(optimizer=lambda: made[0])
    )
    made.append(torch.optim.SGD([*model.parameters(), *learner.heads.parameters()], lr=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run_micro_batch(model, learner)
    early, last = learner.owned()
    assert all(parameter.grad is None for parameter in early.values())
    assert not any(torch.equal(parameter, before[name]) for name, parameter in early.items() if "norm" not in name)
    assert all(torch.equal(parameter, before[name]) and parameter.grad is not None for name, parameter in last.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_objective": "recon"}, "local_objective='recon' is unknown"),
        ({"task_reach": 2, "reach_recompute": False}, "does not work with reach_recompute=False"),
        ({"task_reach": 9}, r"task_reach=\[9\]: 9 is not a number of blocks"),
        ({"local_step": True}, "local_step=True steps blocks within the micro-batch, but events has no optimizer"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LocalLearner(make_model(), LoPTArguments(**settings))


def test_the_state_is_that_of_the_heads():
    one, other = (LocalLearner(make_model(), LoPTArguments(num_blocks=3), seed=seed) for seed in (1, 2))
    other.load_state(one.state())
    assert all(torch.equal(value, other.state()[name]) for name, value in one.state().items())
    with pytest.raises(ValueError, match=r"'0\.1\.weight' is missing in the saved local heads"):
        other.load_state({name: value for name, value in one.state().items() if name != "0.1.weight"})


def test_the_hooks_do_nothing_outside_of_training():
    model, stock = make_model(), make_model()
    LocalLearner(model, LoPTArguments(num_blocks=4))
    inputs = batch()
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
