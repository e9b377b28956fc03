"""Freezing the last blocks: exactly the first one is trained, embeddings included."""

import pytest
from transformers import AutoModelForCausalLM, TrainerState

from lopt_hf.peers.freezing import FreezeLast
from tests.peers.helpers import assert_equal, changed, make_trainer, weights
from tests.tiny import make_model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("num_blocks", "split_at", "trained"), [(2, None, (0, 1)), (4, None, (0,)), (2, [3], (0, 1, 2))]
)
def test_only_the_first_block_changes(tied, num_blocks, split_at, trained, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    head = model.lm_head.weight.detach().clone()
    before = weights(model)
    trainer = make_trainer(tmp_path, FreezeLast(num_blocks, split_at), model=model)
    trainer.train()
    expected = {"model.embed_tokens.weight"} | {n for n in before if any(f".layers.{i}." in n for i in trained)}
    after = weights(model)
    assert changed(before, after) == expected
    assert (after["lm_head.weight"] == head).all()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected


def test_resumed_run_of_a_tied_model(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, FreezeLast(), model=make_model(tie_word_embeddings=True), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, FreezeLast(), model=make_model(tie_word_embeddings=True), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(whole.model, resumed.model)


def test_saved_model_is_a_stock_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, FreezeLast(), model=make_model(tie_word_embeddings=True))
    trainer.train()
    trainer.save_model()
    assert_equal(trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_other_blocks_do_not_go_on_from_a_checkpoint(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, FreezeLast(2), **settings).train()
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-1" / "trainer_state.json"))
    FreezeLast(2).check_state(state)
    with pytest.raises(ValueError, match="freeze_last began with num_blocks=2, and now it is 4"):
        FreezeLast(4).check_state(state)
