"""What must hold for every architecture."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import FAMILIES, make_model
from tests.trainers.helpers import KINDS, make_stock_trainer, make_trainer, one_step_gradients, snapshot

pytestmark = pytest.mark.parametrize("family", FAMILIES)

INPUT_IDS = torch.arange(3, 27).reshape(2, 12)


def owner_names(trainer):
    """For each block the names of the gradients that belong to it."""
    owned = [set(block) for block in trainer.learner.owned()]
    for index, head in trainer.local_heads.items():
        owned[int(index)] |= {f"head.{index}.{name}" for name, _ in head.named_parameters()}
    return owned


def reached(gradients):
    return {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}


@pytest.mark.parametrize(("kind", "num_blocks"), [("sft", 2), ("sft", 3), ("dpo", 3), ("grpo", 3)])
def test_gradient_reach(family, kind, num_blocks, tmp_path):
    """The task gradient stays in the last block, each local gradient in its own block and head."""
    trainer = make_trainer(tmp_path, make_model(family), kind=kind, num_blocks=num_blocks, local_backward="joint")
    *early, last = owner_names(trainer)
    task = reached(one_step_gradients(trainer, "task"))
    assert task <= last
    trained = set(task)
    for index, block in enumerate(early):
        local = reached(one_step_gradients(trainer, index))
        assert local and local <= block
        trained |= local
    # An expert that no token was routed to, and a key's bias (softmax does not see it), have a zero gradient.
    missed = set().union(last, *early) - trained
    assert {name for name in missed if "k_proj.bias" not in name and "experts" not in name} == set()


def test_evaluation_and_generation_are_the_stock_models(family, tmp_path):
    stock = make_stock_trainer(tmp_path / "stock", make_model(family)).model.eval()
    ours = make_trainer(tmp_path / "lopt", make_model(family)).model.eval()
    with torch.no_grad():
        assert torch.equal(ours(INPUT_IDS).logits, stock(INPUT_IDS).logits)
    generate = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(INPUT_IDS, **generate), stock.generate(INPUT_IDS, **generate))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_moves_and_the_checkpoint_is_stock(family, kind, tmp_path):
    trainer = make_trainer(tmp_path, make_model(family), kind=kind)
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert unmoved == [], f"Parameters have not changed: {unmoved}"
    trainer.save_model(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(loaded.eval()(INPUT_IDS).logits, trainer.model.eval()(INPUT_IDS).logits)


@pytest.mark.parametrize(("kind", "checkpointing"), [("sft", False), ("sft", True), ("dpo", True), ("grpo", True)])
def test_eager_gradients_equal_joint_gradients(family, kind, checkpointing, tmp_path):
    settings = {"kind": kind, "num_blocks": 3, "gradient_checkpointing": checkpointing}
    joint = one_step_gradients(make_trainer(tmp_path, make_model(family), local_backward="joint", **settings))
    eager = one_step_gradients(make_trainer(tmp_path, make_model(family), local_backward="eager", **settings))
    assert reached(joint) == reached(eager)
    for name in reached(joint):
        torch.testing.assert_close(eager[name], joint[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
