"""Checkpointing by segments: the gradients of end-to-end training bit for bit, for a share of its activations."""

import pytest
import torch
from peft import LoraConfig

from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.peers.segments import CheckpointSegments
from tests.peers.helpers import assert_equal, changed, make_trainer, weights
from tests.tiny import FAMILIES, VOCABULARY, make_model
from tests.trainers.families import make_family

TOKENS_BT = torch.arange(2 * 24).reshape(2, 24) % (len(VOCABULARY) - 3) + 3
NO_OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)])


def gradients(model, segments=None, split_at=None, autocast=False):
    """The gradients of a model's own loss on a padded batch, with dropout where the model has it."""
    peer = None if segments is None else CheckpointSegments(segments, split_at)
    if peer is not None:
        peer.prepare(model)
        peer.start(NO_OPTIMIZER)
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    mask_BT = torch.ones_like(TOKENS_BT)
    mask_BT[0, -5:] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=TOKENS_BT, attention_mask=mask_BT, labels=TOKENS_BT, use_cache=False).loss
    loss.backward()
    if peer is not None:
        peer.stop()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("segments", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_end_to_end_training(family, segments):
    model = make_model(family)
    expected = gradients(model)
    found = gradients(model, segments)
    assert found.keys() == expected.keys()
    assert changed(expected, found) == set()


def test_dropout_is_that_of_the_first_pass():
    model = make_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    expected = gradients(model)
    assert changed(expected, gradients(model, 2)) == set()
    without = make_model("gpt2")
    assert changed(expected, gradients(without)) != set()  # so there was some


def test_autocast_is_that_of_the_first_pass():
    model = make_model()
    assert changed(gradients(model, autocast=True), gradients(model, 4, autocast=True)) == set()


def test_tied_weights_and_uneven_segments():
    model = make_model(tie_word_embeddings=True)
    assert changed(gradients(model), gradients(model, 3, split_at=[1, 2])) == set()


@pytest.mark.parametrize("segments", [2, 4, 8])
def test_saved_bytes_are_those_of_one_segment(segments):
    model = make_model(num_hidden_layers=16, hidden_size=64).train()

    def saved():
        with SavedBytes(model) as counter:
            model.base_model(input_ids=TOKENS_BT).last_hidden_state.sum().backward()
        return counter.peak

    whole = saved()
    peer = CheckpointSegments(segments)
    peer.prepare(model)
    peer.start(NO_OPTIMIZER)
    assert 0.9 / segments < saved() / whole < 1.0 / segments + 0.05
    peer.stop()
    assert saved() == whole


def test_nothing_changes_without_gradients():
    model = make_model()
    peer = CheckpointSegments(2)
    peer.prepare(model)
    expected = model(input_ids=TOKENS_BT).logits
    peer.start(NO_OPTIMIZER)
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=TOKENS_BT).logits, expected)
    logits = model.eval()(input_ids=TOKENS_BT).logits
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_layer_that_raises_leaves_gradients_enabled():
    model = make_model().train()
    peer = CheckpointSegments(2)
    peer.prepare(model)
    peer.start(NO_OPTIMIZER)
    handle = model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=TOKENS_BT)
    assert torch.is_grad_enabled()
    handle.remove()
    model(input_ids=TOKENS_BT, labels=TOKENS_BT).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_model_that_does_more_between_layers():
    model = make_model().train()
    model.model.layers[1].register_forward_pre_hook(lambda layer, args: (2 * args[0], *args[1:]))
    peer = CheckpointSegments(2)
    peer.prepare(model)
    peer.start(NO_OPTIMIZER)
    with pytest.raises(ValueError, match="e2e_segments does not work with this model, whose layers get more"):
        model(input_ids=TOKENS_BT)


def test_keys_that_another_segment_shares():
    model = make_family("gemma4_text").train()
    peer = CheckpointSegments(2)
    peer.prepare(model)
    peer.start(NO_OPTIMIZER)
    with pytest.raises(ValueError, match="e2e_segments does not work with this model, whose layers get more"):
        model(input_ids=TOKENS_BT)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
def test_whole_run_is_end_to_ends(settings, tmp_path):
    plain = make_trainer(tmp_path / "plain", **settings)
    plain.train()
    segments = make_trainer(tmp_path / "segments", CheckpointSegments(4), **settings)
    segments.train()
    assert_equal(plain.model, segments.model)


@pytest.mark.parametrize("layers", [None, [3]], ids=["on all layers", "on the last layer"])
def test_adapters(layers, tmp_path):
    peft = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, layers_to_transform=layers)
    runs = []
    for name, callbacks in (("plain", []), ("segments", [CheckpointSegments(2)])):
        torch.manual_seed(0)
        runs.append(make_trainer(tmp_path / name, *callbacks, peft=peft))
        before = weights(runs[-1].model)
        runs[-1].train()
        assert changed(before, weights(runs[-1].model)) == {name for name in before if "lora" in name}
    assert_equal(runs[0].model, runs[1].model)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"gradient_checkpointing": True}, "set activation_checkpointing to False"),
        ("mixtral", {}, "output_router_logits=True does not work with e2e_segments"),
    ],
)
def test_runs_that_do_not_suit(family, changes, message, tmp_path):
    model = make_model(family, output_router_logits=True) if family == "mixtral" else make_model()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, CheckpointSegments(2), model=model, **changes)


def test_more_segments_than_layers(tmp_path):
    with pytest.raises(ValueError, match="num_blocks=5 does not fit a model with 4 layers"):
        make_trainer(tmp_path, CheckpointSegments(5))
