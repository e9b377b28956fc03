"""The auxiliary path: the pretrained model with layers left out, moving averages, shared weights."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.cache_utils import Cache

from lopt_hf.local.blocks import split_layers
from lopt_hf.local.layer_calls import record_layer_calls
from lopt_hf.local.methods.mlaan.auxiliary import copy_layer
from lopt_hf.local.methods.mlaan.leaps import calibrated_leaps, check_leaps, even_leaps, leap_counts
from lopt_hf.local.stacks import find_decoder_stack
from tests.local.methods.mlaan.helpers import first_batch, gradients_of, make_mlaan_trainer, next_token_loss
from tests.tiny import FAMILIES, make_model


def model_without(model, kept):
    """A stock model of the same class with some of the layers."""
    smaller = copy.deepcopy(model)
    decoder = smaller.get_decoder()
    name, layers = next(
        (n, m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == len(kept) + 1
    )
    text = smaller.config.get_text_config(decoder=True)
    text.num_hidden_layers = len(kept)
    if text.to_dict().get("layer_types"):
        text.layer_types = [text.layer_types[index] for index in kept]
    decoder.set_submodule(name, nn.ModuleList([layers[index] for index in kept]))
    return smaller


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_it_is_the_model_with_layers_left_out(family, tmp_path):
    """Without translators: block 0 is layer 0, and its auxiliary layers 2 and 3. Every architecture's masks and
    rotary embeddings reach the copies."""
    settings = {"num_blocks": 2, "split_at": [1], "leap_layers": [[2, 3]], "translator": "none", "window": 1}
    trainer = make_mlaan_trainer(tmp_path, make_model(family), **settings)
    smaller = model_without(make_model(family), [0, 2, 3]).eval()
    trainer.local_heads.eval()
    inputs = first_batch(trainer)
    gradients_of(trainer, inputs)
    with torch.no_grad():
        logits = smaller(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
    expected = next_token_loss(logits, inputs["labels"])
    torch.testing.assert_close(trainer.boundary.window_losses["block_0/cascaded"][0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("readout", ["frozen", "ema"])
def test_averages_follow_the_closed_form(tmp_path, readout):
    decay, steps = 0.9, 3
    settings = {"num_blocks": 2, "window": 1, "leap_layers": [2], "ema_decay": decay, "readout": readout}
    trainer = make_mlaan_trainer(tmp_path, max_steps=steps, gradient_accumulation_steps=2, **settings)
    names = {"model.layers.2.mlp.up_proj.weight": "averages.2.mlp.up_proj.weight"} | (
        {"model.norm.weight": "readout.model.model.tail.norm.weight", "lm_head.weight": "readout.model.lm_head.weight"}
        if readout == "ema"
        else {}
    )
    weights = dict(trainer.model.named_parameters())
    expected = {name: weights[name].detach().clone() for name in names}
    update = trainer.learner.after_step
    updated_at = []

    def follow():
        updated_at.append(trainer.state.global_step)
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * weights[name].detach()
        update()

    trainer.learner.after_step = follow
    trainer.train()
    assert updated_at == list(range(steps))  # once for each step, which is counted afterwards
    averages = dict(trainer.local_heads["0"].named_parameters())
    for name, average in names.items():
        torch.testing.assert_close(averages[average], expected[name])
        assert not torch.equal(averages[average], weights[name])


def test_distances_are_those_from_the_live_layers(tmp_path):
    trainer = make_mlaan_trainer(tmp_path, num_blocks=2, window=1, leap_layers=[[2, 3]])
    auxiliary, layers = trainer.local_heads["0"], trainer.stack.layers
    names = ["copy of layer 2", "copy of layer 3", "average of layer 2"]
    assert auxiliary.distances(layers) == dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for parameter in layers[2].parameters():
            parameter.mul_(2)
        for parameter in auxiliary.copies["3"].parameters():
            parameter.zero_()
    expected = dict(zip(names, (0.5, 1.0, 0.5), strict=True))
    assert auxiliary.distances(layers) == pytest.approx(expected)
    auxiliary.update_averages(layers, decay=0.75)
    assert auxiliary.distances(layers)["average of layer 2"] == pytest.approx(0.5 * 0.75)


def test_trainable_readouts_are_each_blocks_own(tmp_path):
    trainer = make_mlaan_trainer(tmp_path, num_blocks=3, readout="trainable")
    heads = [trainer.local_heads[index].readout.model.lm_head.weight for index in "01"] + [
        trainer.model.lm_head.weight
    ]
    assert all(weight.requires_grad and torch.equal(weight, heads[-1]) for weight in heads)
    assert len({weight.data_ptr() for weight in heads}) == 3


def test_a_layers_call_holds_no_cache():
    """A copy that wrote its keys into the model's cache would change what the layer itself sees."""
    inputs = {"input_ids": torch.arange(3, 15)[None], "use_cache": True}
    calls = record_layer_calls(find_decoder_stack(make_model()), (), inputs)
    given = [value for call in calls.values() for value in (*call.args, *call.kwargs.values())]
    assert len(calls) == 4 and not any(isinstance(value, Cache) for value in given)


def test_with_lora_copies_share_the_frozen_weights(tmp_path):
    kwargs = {"peft_config": LoraConfig(target_modules="all-linear", init_lora_weights=False)}
    trainer = make_mlaan_trainer(tmp_path, trainer_kwargs=kwargs, num_blocks=2, window=1)
    live = dict(trainer.stack.layers[3].named_parameters())
    auxiliary = trainer.local_heads["0"]
    for made in (auxiliary.copies["3"], auxiliary.averages["3"]):
        for name, parameter in made.named_parameters():
            assert (parameter is live[name]) == ("lora_" not in name)
    saved = trainer.learner.state()
    assert saved and all("lora_" in name or "translators" in name for name in saved)


def test_a_copy_leaves_hooks_behind():
    model = make_model()
    layer = model.model.layers[3]
    layer.register_forward_hook(lambda *args: None)
    layer.mlp.register_forward_pre_hook(lambda *args: None)
    copied = copy_layer(model, layer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())
    assert layer._forward_hooks and layer.mlp._forward_pre_hooks


def test_even_leaps_end_with_the_last_layer_and_never_repeat():
    for num_layers in range(3, 12):
        for stop in range(1, num_layers):
            for count in range(1, num_layers - stop + 1):
                leaps = even_leaps(stop, num_layers, count)
                assert len(set(leaps)) == count and leaps[-1] == num_layers - 1 and leaps[0] >= stop
                assert leaps == sorted(leaps)


def test_default_counts_fall_with_depth():
    assert leap_counts(split_layers(30, 4), 0.5) == [11, 7, 4]
    assert leap_counts(split_layers(30, 4), 0.0) == [1, 1, 1]
    assert leap_counts(split_layers(4, 4), 1.0) == [3, 2, 1]


def test_calibrated_leaps_are_chosen_one_after_the_other():
    useful = {7: 3.0, 5: 2.0, 9: 1.0}
    chosen = calibrated_leaps(4, 10, 3, lambda leaps: -sum(useful.get(index, 0.0) for index in leaps))
    assert chosen == [5, 7, 9]


@pytest.mark.parametrize(
    ("leaps", "message"),
    [
        ([6, 1, 1], "leap_layers=6 of block 0 .* more than the 5 layers that follow"),
        ([[6], 1, 1], "must end with the last layer, 7"),
        ([[7], [4, 7], [7]], r"\[4, 7\] of block 1 .* from 5 on"),
        ([[5, 4, 7], 1, 1], r"\[5, 4, 7\] of block 0 .* increasing"),
    ],
)
def test_leaps_that_do_not_fit(leaps, message):
    with pytest.raises(ValueError, match=message):
        check_leaps(leaps, split_layers(8, 4, [3, 5, 6]))
