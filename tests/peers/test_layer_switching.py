"""LISA and BAdam: what is trained at a step, with which state, and what a resumed run does."""

import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from lopt_hf.peers.layer_switching import LISA, BAdam
from tests.peers.helpers import Steps, assert_equal, make_trainer, weights
from tests.tiny import make_dataset, make_model

NUM_LAYERS = 4


def of_layers(model, layers):
    return {name for name in weights(model) if any(f".layers.{layer}." in name for layer in layers)}


def rest(model):
    return set(weights(model)) - of_layers(model, range(NUM_LAYERS))


@pytest.mark.parametrize("make_peer", [lambda: LISA(2, period=2), lambda: BAdam(period=2)], ids=["LISA", "BAdam"])
def test_only_the_active_layers_have_gradients_and_state_and_change(make_peer, tmp_path):
    peer, steps = make_peer(), Steps()
    trainer = make_trainer(tmp_path, peer, steps, max_steps=7)
    trainer.train()
    always = rest(trainer.model) if peer.name == "LISA" else set()
    drawn = [tuple(peer.active(step)) for step in range(7)]
    assert len(set(drawn)) > 1
    for step, layers in enumerate(drawn):
        active = of_layers(trainer.model, layers)
        assert len(layers) == (2 if peer.name == "LISA" else 1)
        assert steps.with_gradient[step] == active | always
        assert steps.changed[step] == active | always
        # A layer begins anew with each period, also one that was drawn twice in a row; the rest goes on.
        expected = dict.fromkeys(active, step % 2 + 1) | dict.fromkeys(always, step + 1)
        assert steps.adam_steps[step] == expected
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_lisa_trains_embeddings_norm_and_head_at_every_step(tmp_path):
    steps = Steps()
    trainer = make_trainer(tmp_path, LISA(1, period=1), steps)
    trainer.train()
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert rest(trainer.model) == outside
    assert all(outside <= names for names in steps.changed)


def test_badam_is_a_run_of_each_layer_after_the_other(tmp_path):
    """By TRL's trainer alone: two steps with all but the third layer frozen, then two with all but the first."""
    constant = {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    data = make_dataset(16)
    trainer = make_trainer(tmp_path / "a", BAdam(period=2, order=[2, 0]), data=data, max_steps=4, **constant)
    trainer.train()
    model = make_model()
    for turn, layer in enumerate((2, 0)):
        model.requires_grad_(False)
        model.model.layers[layer].requires_grad_(True)
        rows = data.select(range(8 * turn, 8 * turn + 8))
        make_trainer(tmp_path / str(turn), model=model, data=rows, max_steps=2, **constant).train()
    assert_equal(trainer.model, model)


def test_lisa_draws_all_layers_alike():
    peer = LISA(2, period=5, seed=3)
    peer.prepare(make_model())
    drawn = [tuple(peer.active(5 * period)) for period in range(600)]
    assert all(tuple(peer.active(5 * period + 4)) == drawn[period] for period in range(600))
    assert all(len(set(layers)) == 2 for layers in drawn)
    counts = Counter(layer for layers in drawn for layer in layers)
    assert all(250 < counts[layer] < 350 for layer in range(NUM_LAYERS))


def test_badam_trains_every_layer_once_in_a_round_in_orders_that_differ():
    peer = BAdam(period=3, seed=0)
    peer.prepare(make_model())
    rounds = [
        [peer.active(3 * (NUM_LAYERS * number + place))[0] for place in range(NUM_LAYERS)] for number in range(20)
    ]
    assert all(sorted(order) == list(range(NUM_LAYERS)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 5


@pytest.mark.parametrize("saved_at", [2, 3], ids=["at a switch", "within a period"])
@pytest.mark.parametrize("make_peer", [lambda: LISA(2, period=2), lambda: BAdam(period=2)], ids=["LISA", "BAdam"])
def test_resumed_run_has_the_same_layers_and_weights(make_peer, saved_at, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": saved_at}
    whole = make_trainer(tmp_path, make_peer(), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, make_peer(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert_equal(whole.model, resumed.model)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (LISA(2, period=2), LISA(2, period=3), "LISA began with period=2, and now it is 3; set it as it was"),
        (LISA(2, period=2), LISA(1, period=2), "LISA began with layers=2, and now it is 1"),
        (LISA(2, period=2), LISA(2, period=2, seed=1), "LISA began with seed=42, and now it is 1"),
        (BAdam(period=2), LISA(2, period=2), "that run was not trained by LISA; start anew"),
    ],
)
def test_another_cycle_does_not_go_on_from_a_checkpoint(first, then, message, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, first, **settings).train()
    trainer = make_trainer(tmp_path, then, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_what_the_user_has_frozen_stays_so(tmp_path):
    model = make_model()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)
    before = weights(model)
    make_trainer(tmp_path, LISA(4, period=1), model=model).train()
    frozen = [name for name in before if "embed_tokens" in name or "layers.1.mlp" in name]
    assert all(torch.equal(before[name], weights(model)[name]) for name in frozen)
    assert not any(dict(model.named_parameters())[name].requires_grad for name in frozen)


@pytest.mark.parametrize("make_peer", [lambda: LISA(1, period=1), lambda: BAdam(period=1)], ids=["LISA", "BAdam"])
def test_what_a_run_that_broke_off_has_frozen_is_trained_again(make_peer, tmp_path, caplog):
    model = make_model()
    model.model.norm.requires_grad_(False)

    class Interrupted(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, make_peer(), Interrupted(), model=model).train()
    assert sum(not parameter.requires_grad for parameter in model.parameters()) > 1

    with caplog.at_level(logging.WARNING, logger="lopt_hf"):
        trainer = make_trainer(tmp_path, make_peer(), model=model)
    assert "had not come to its end on this model" in caplog.text
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    trainer.train()
    caplog.clear()
    make_trainer(tmp_path, make_peer(), model=model)
    assert not caplog.text


def test_gradients_are_accumulated_within_a_step(tmp_path):
    steps = Steps()
    peer = BAdam(period=1)
    trainer = make_trainer(tmp_path, peer, steps, gradient_accumulation_steps=2, max_steps=3)
    trainer.train()
    assert steps.changed == [of_layers(trainer.model, peer.active(step)) for step in range(3)]


def test_run_too_short_for_a_round_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lopt_hf"):
        make_trainer(tmp_path, BAdam(period=2), max_steps=1).train()
    assert "BAdam: 1 steps are not enough for every layer to be trained once, which takes about 8" in caplog.text


@pytest.mark.parametrize(
    ("make_peer", "changes", "message"),
    [
        (lambda: LISA(5), {}, "LISA: layers=5, but the model has 4; use at most as many"),
        (lambda: LISA(0), {}, "LISA: layers=0 is too small; set it to 1 or more"),
        (lambda: BAdam(0), {}, "BAdam: period=0 is too small"),
        (
            LISA,
            {"peft": LoraConfig(r=2, target_modules="all-linear")},
            "LISA trains the model's own weights",
        ),
        (
            BAdam,
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "does not work with BAdam.*set use_reentrant to False",
        ),
    ],
)
def test_runs_that_do_not_suit(make_peer, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_peer(), **changes)


@pytest.mark.parametrize("run", [{"world_size": 2}, {"fsdp": "full_shard"}, {"deepspeed": "zero2.json"}], ids=str)
def test_several_processes_and_engines_are_refused(run):
    args = SimpleNamespace(**{"world_size": 1, "fsdp": None, "deepspeed": None, **run})
    with pytest.raises(ValueError, match="LISA trains in one process without an engine.*; launch one"):
        LISA().check(args)


def test_callback_that_comes_too_late_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(LISA())
    with pytest.raises(ValueError, match="LISA came to a trainer that was there already; pass it"):
        trainer.train()
