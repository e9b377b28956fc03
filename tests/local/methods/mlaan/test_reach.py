"""MLAAN whose task loss reaches more than its window at some steps."""

import pytest
import torch

from tests.local.methods.mlaan.helpers import first_batch, gradients_of, make_mlaan_trainer
from tests.tiny import make_model
from tests.trainers.helpers import make_stock_trainer
from tests.trainers.test_local_step import end
from tests.trainers.test_reach import untied
from tests.trainers.test_resume import assert_equal


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_tasks_gradient_is_added_to_the_auxiliaries(tmp_path, family, window):
    settings = {"num_blocks": 4, "window": window}
    trainer = make_mlaan_trainer(tmp_path, untied(family), task_reach=[1, 4, 3], **settings)
    plain = gradients_of(make_mlaan_trainer(tmp_path, untied(family), **settings), batch := first_batch(trainer))
    task = gradients_of(make_stock_trainer(tmp_path, untied(family)), batch)
    for step, reach in enumerate([1, 4, 3]):
        trainer.state.global_step = step
        gradients = gradients_of(trainer, batch)
        for index, names in enumerate(trainer.learner.owned()):
            for name in names:
                is_added = 4 - reach <= index < 4 - window  # the task's window has its gradient anyway
                added = trainer.args.task_share * task[name] if is_added else 0.0
                torch.testing.assert_close(gradients[name], plain[name] + added, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_some_micro_batches_is_unbiased(tmp_path):
    settings = {"num_blocks": 3, "window": 1, "gradient_accumulation_steps": 2}
    trainer = make_mlaan_trainer(tmp_path, untied(), task_reach=[1, 3], reach_unit="microbatch", **settings)
    trainer.current_gradient_accumulation_steps = 2
    batch = first_batch(trainer)
    task = gradients_of(make_stock_trainer(tmp_path, untied()), batch)

    def at(position):
        trainer.model.train()
        trainer.model.zero_grad()
        with trainer.learner.micro_batch():
            trainer.learner._position = position
            trainer.compute_loss(trainer.model, batch).backward()
            trainer.learner.after_backward()
        return {name: p.grad for name, p in trainer.model.named_parameters()}

    without, reached = at(0), at(1)
    for names in trainer.learner.owned()[:-1]:
        for name in names:
            expected = without[name] + 2 * trainer.args.task_share * task[name]
            torch.testing.assert_close(reached[name], expected, rtol=1e-5, atol=1e-7)


def test_without_it_nothing_changes(tmp_path):
    ends = []
    for settings in ({}, {"task_reach": 1}):
        trainer = make_mlaan_trainer(tmp_path, make_model(), num_blocks=3, window=2, **settings)
        trainer.train()
        ends.append(end(trainer))
    assert_equal(*ends)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_reach": [1, 2]}, "does nothing with window=2"),
        ({"task_reach": 5}, "5 is not a number of blocks"),
        (
            {
                "task_reach": 4,
                "window": 1,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            "task_reach=[4] does not work with reentrant",
        ),
    ],
)
def test_bad_input(tmp_path, settings, message):
    with pytest.raises(ValueError) as error:
        make_mlaan_trainer(tmp_path, num_blocks=4, **settings)
    assert message in str(error.value)
