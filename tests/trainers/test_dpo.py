"""What DPO adds: one forward for chosen and rejected answers, and a reference that local learning leaves alone."""

import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig

from lopt_hf import LoPTDPOTrainer
from tests.tiny import make_model, make_pairs, make_tokenizer
from tests.trainers.helpers import make_stock_trainer, make_trainer, training_args


@pytest.fixture
def base(tmp_path):
    """A folder with a model, from which TRL loads the reference."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def test_chosen_and_rejected_share_one_forward(tmp_path, base):
    trainer = make_trainer(tmp_path / "out", base, kind="dpo", max_steps=1)
    rows = []
    trainer.stack.layers[0].register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    trainer.train()
    assert rows == [2 * trainer.args.per_device_train_batch_size]


def test_the_reference_stays_the_stock_model(tmp_path, base):
    trainer = make_trainer(tmp_path / "out", base, kind="dpo")
    assert not any(layer._forward_hooks for layer in trainer.ref_model.model.layers)
    trainer.train()
    stock = make_model().state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in trainer.ref_model.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"precompute_ref_log_probs": True}], ids=["model", "precomputed"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_first_loss_is_that_of_a_policy_equal_to_its_reference(tmp_path, base, peft, settings):
    """log 2, whatever gives the reference: a model, the adapter switched off, or numbers from before the training."""
    kwargs = {"peft_config": LoraConfig(target_modules="all-linear")} if peft else None
    trainer = make_trainer(tmp_path / "out", base, kwargs, "dpo", **settings)
    assert (trainer.ref_model is None) == (peft or bool(settings))
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.693147, abs=1e-4) and losses[1] != losses[0]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_precomputed_and_running_reference_train_the_same(tmp_path, base, peft):
    runs = {}
    for precompute in (False, True):
        kwargs = {"peft_config": LoraConfig(target_modules="all-linear")} if peft else None
        trainer = make_trainer(
            tmp_path / str(precompute), base, kwargs, "dpo", precompute_ref_log_probs=precompute, max_steps=4
        )
        trainer.train()
        runs[precompute] = logged(trainer, "loss")
    assert runs[True] == pytest.approx(runs[False], rel=1e-4)


def test_evaluation_is_dpo_trainers(tmp_path):
    ours = make_trainer(tmp_path / "a", kind="dpo").evaluate(make_pairs(8))
    stock = make_stock_trainer(tmp_path / "b", kind="dpo").evaluate(make_pairs(8))
    for name in ("eval_loss", "eval_logps/chosen", "eval_logps/rejected"):
        assert ours[name] == stock[name]


def test_it_learns_to_prefer(tmp_path):
    trainer = make_trainer(tmp_path, kind="dpo", max_steps=60, learning_rate=5e-3)
    trainer.train()
    assert trainer.evaluate(make_pairs())["eval_rewards/accuracies"] > 0.9


def test_plain_dpo_arguments_are_accepted(tmp_path, base):
    args = DPOConfig(**training_args(tmp_path / "out", beta=0.3))
    trainer = LoPTDPOTrainer(base, None, args, train_dataset=make_pairs())
    assert (trainer.args.num_blocks, trainer.args.beta) == (2, 0.3)
