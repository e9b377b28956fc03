import pytest
import torch

from lopt_hf.local.objectives import LocalBatch, head_of
from lopt_hf.local.readout import ReadoutObjective
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.meters.saved_bytes import SavedBytes
from tests.tiny import FAMILIES, VOCABULARY, make_model

# What a family does between the last layer and the loss, where its tiny configuration does not show it.
VARIANTS = {
    "gemma2 with hard capping": ("gemma2", {"final_logit_softcapping": 0.5}),
    "granite with scaling": ("granite", {"logits_scaling": 4.0}),
    "cohere": ("cohere", {**FAMILIES["llama"], "logit_scale": 0.25}),
    "opt without final norm": ("opt", {"do_layer_norm_before": False}),
    "opt without projections": ("opt", {"word_embed_proj_dim": 32}),
    "gpt_neox tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "phi, whose head has a bias": ("phi", {**FAMILIES["llama"], "num_key_value_heads": 4}),
}
CASES = {**{family: (family, {}) for family in FAMILIES}, **VARIANTS}


def make_batch():
    """Two rows whose prompts and padding have no label."""
    torch.manual_seed(0)
    input_ids = torch.randint(3, len(VOCABULARY), (2, 13))
    labels = input_ids.clone()
    labels[:, :3] = labels[1, 9:] = -100
    return input_ids, labels


def stock_loss(model, input_ids, labels):
    """The model's own loss, and what its last layer gave."""
    outputs = []
    last = find_decoder_stack(model).layers[-1]
    handle = last.register_forward_hook(lambda layer, args, output: outputs.append(output))
    loss = model(input_ids=input_ids, labels=labels).loss
    handle.remove()
    return loss, outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def readout_loss(objective, h, labels):
    return objective(head_of(objective, h.shape[-1]), h, h, LocalBatch(inputs={"labels": labels}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_last_layers_readout_loss_is_the_models_own(case, autocast, monkeypatch):
    family, overrides = CASES[case]
    monkeypatch.setitem(FAMILIES, family, FAMILIES.get(family, {}))
    model = make_model(family, **overrides)
    for parameter in model.parameters():  # norms and biases are ones and zeros at the start
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    input_ids, labels = make_batch()
    objective = ReadoutObjective.from_model(model, max_logits=4 * len(VOCABULARY))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, h = stock_loss(model, input_ids, labels)
        loss = readout_loss(objective, h, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, stock = torch.autograd.grad(loss, h)[0], torch.autograd.grad(expected, h)[0]
    # Under autocast the sum's gradient is rounded before its division by the number of tokens, the mean's after it.
    rtol, atol = (2e-2, 2e-4) if autocast else (1e-5, 1e-8)
    torch.testing.assert_close(ours, stock, rtol=rtol, atol=atol)


def test_logits_exist_for_one_chunk_at_a_time():
    """The peak of what autograd keeps does not grow with the tokens, but for the hidden states."""
    model = make_model(vocab_size=20_000)
    h = torch.randn(1, 257, 32, requires_grad=True)
    labels = torch.randint(0, 20_000, (1, 257))
    peaks = {}
    for tokens_per_chunk in (16, 256):
        objective = ReadoutObjective.from_model(model, max_logits=tokens_per_chunk * 20_000)
        with SavedBytes([*model.parameters(), *objective.readout.parameters()]) as saved:
            loss = readout_loss(objective, h, labels)
            after_the_forward = saved.current
            loss.backward()
        peaks[tokens_per_chunk] = saved.peak
        hidden_bytes = h.numel() * h.element_size()
        assert after_the_forward <= 2 * hidden_bytes  # their gradient, and which tokens count
        chunk_bytes = tokens_per_chunk * 20_000 * 4
        assert chunk_bytes <= saved.peak <= 2 * chunk_bytes + 2 * hidden_bytes
    assert peaks[256] > 14 * peaks[16]


def test_chunks_do_not_change_the_loss():
    model, (input_ids, labels) = make_model(), make_batch()
    _, h = stock_loss(model, input_ids, labels)
    whole, parts = (
        readout_loss(ReadoutObjective.from_model(model, max_logits=n), h, labels) for n in (10**9, len(VOCABULARY))
    )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)


def test_what_trains_is_copied_and_what_is_frozen_is_shared():
    model, (input_ids, labels) = make_model(), make_batch()
    model.lm_head.requires_grad_(False)
    objective = ReadoutObjective.from_model(model)
    _, h = stock_loss(model, input_ids, labels)
    before = readout_loss(objective, h, labels)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert torch.equal(readout_loss(objective, h, labels), before)
    assert model.lm_head in list(objective.readout.modules())
    assert not any(parameter.requires_grad for parameter in objective.readout.parameters())
    assert model.model.norm.weight.requires_grad


def test_without_a_copy_the_models_own_modules_read_out():
    model = make_model()
    with pytest.raises(ValueError, match="trainable parameter.*copy=True"):
        ReadoutObjective.from_model(model, copy=False)
    model.model.norm.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    modules = list(ReadoutObjective.from_model(model, copy=False).readout.modules())
    assert model.model.norm in modules and model.lm_head in modules


def test_only_the_weights_after_the_layers_are_needed():
    """A pipeline stage has neither embeddings nor the other stages' layers."""
    model = make_model()
    expected = ReadoutObjective.from_model(model).fingerprint
    model.model.embed_tokens.to("meta")
    model.model.layers.to("meta")
    assert ReadoutObjective.from_model(model).fingerprint == expected
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="Linear, after the decoder layers, are not loaded"):
        ReadoutObjective.from_model(model)
    model.lm_head = torch.nn.Identity()  # stands for a head that another stage has
    with pytest.raises(ValueError, match="Linear, after the decoder layers, are not loaded"):
        ReadoutObjective.from_model(model)


def test_the_random_state_and_the_model_are_left_alone():
    model = make_model()
    modules = [(name, module.training) for name, module in model.named_modules()]
    before = torch.get_rng_state()
    ReadoutObjective.from_model(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [(name, module.training) for name, module in model.named_modules()] == modules
    assert model.model.norm.weight.requires_grad and not model.model.norm._forward_hooks


def test_hooks_of_the_model_are_not_copied():
    model, (input_ids, labels) = make_model(), make_batch()
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    objective = ReadoutObjective.from_model(model)
    _, h = stock_loss(model, input_ids, labels)
    seen = len(calls)
    readout_loss(objective, h, labels)
    assert len(calls) == seen


def test_a_batch_without_a_counted_token_gives_zero():
    objective, h = ReadoutObjective.from_model(make_model()), torch.randn(2, 5, 32, requires_grad=True)
    loss = readout_loss(objective, h, torch.full((2, 5), -100))
    loss.backward()
    assert loss == 0 and not h.grad.any()


@pytest.mark.parametrize("inputs", [{}, {"labels": torch.zeros(2, 4, dtype=torch.long)}], ids=["none", "too few"])
def test_missing_labels_are_an_error(inputs):
    objective, h = ReadoutObjective.from_model(make_model()), torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match=r"needs a label for each of the \(2, 5\) tokens"):
        objective(torch.nn.Identity(), h, h, LocalBatch(inputs=inputs))


def test_the_fingerprint_is_of_the_weights():
    first, same = ReadoutObjective.from_model(make_model()), ReadoutObjective.from_model(make_model())
    assert first.fingerprint == same.fingerprint
    assert first.fingerprint != ReadoutObjective.from_model(make_model(seed=1)).fingerprint
    assert first.fingerprint != ReadoutObjective.from_model(make_model().to(torch.bfloat16)).fingerprint
