"""Operators that leave a stock model: spans, folding, and what plain `transformers` and GGUF make of the result."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lopt_hf import RepLConfig, RepLModel, get_repl_model
from lopt_hf.repl import mapping
from lopt_hf.repl.calibration import _LinearFit
from lopt_hf.repl.choosing import check_enough_tokens, fit_and_measure, span_angles
from lopt_hf.repl.map_operators import rotation
from lopt_hf.repl.modeling_repl import find_layers
from lopt_hf.repl.neighbours import Neighbour
from lopt_hf.repl.operators import make_operator
from lopt_hf.repl.surgery import remove_layers
from tests.repl.helpers import FAMILIES, INPUT_IDS, batches, logits, make_repl, make_stock, make_vit

SPANS = {"layers_to_replace": None, "spans": [[1, 3], [4, 5]]}
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
WITH_EXPERTS = {"mixtral": {}, "qwen3_moe": {"mlp_only_layers": [0, 3, 4], "num_hidden_layers": 7}}
DENSE = [family for family in FAMILIES if family != "gemma2"]


def make(family="llama", operator="down_proj", **settings):
    model = make_stock(family, **WITH_EXPERTS.get(family, {}))
    # Two layers of Gemma 2 in a row attend in two ways
    spans = {"gemma2": [[1, 2], [4, 5]], "qwen3_moe": [[1, 3], [4, 5]]}.get(family, SPANS["spans"])
    return make_repl(model, operator=operator, **{**SPANS, "spans": spans, **settings})


CASES = [(family, "scale") for family in (*FAMILIES, *WITH_EXPERTS)]
CASES += [(family, "down_proj") for family in (*DENSE, *WITH_EXPERTS)] + [
    (f, "refit") for f in ("llama", "gpt2", "opt")
]


@pytest.mark.parametrize(("family", "operator"), CASES)
def test_folded_models_are_their_familys_own(family, operator, tmp_path):
    stock = make_stock(family, **WITH_EXPERTS.get(family, {}))
    model = make(family, operator)
    expected, generated = logits(model), model.generate(INPUT_IDS, **OPTIONS)
    assert not torch.allclose(expected, logits(stock), rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "unfolded")
    loaded = RepLModel.from_pretrained(tmp_path / "unfolded").eval()
    torch.testing.assert_close(logits(loaded), expected)
    folded = loaded.merge_and_unload()
    assert type(folded) is type(stock) and type(folded.config) is type(stock.config)
    folded.save_pretrained(tmp_path / "folded")
    saved = json.loads((tmp_path / "folded/config.json").read_text())
    assert "repl" not in saved and "auto_map" not in saved and saved["architectures"] == [type(stock).__name__]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert type(again) is type(stock) and not any(info.values()), info
    removed = [layer for span in model.config.repl["config"]["spans"] for layer in range(*span)]
    kinds = [type(layer.mlp).__name__ if "mlp" in dict(layer.named_children()) else "" for layer in find_layers(stock)]
    kept = [kind for index, kind in enumerate(kinds) if index not in removed]
    assert [
        type(layer.mlp).__name__ if kind else "" for layer, kind in zip(find_layers(again), kept, strict=True)
    ] == kept
    # A norm's eps does not grow with what it reads.
    near = {"rtol": 1e-2, "atol": 2e-3} if operator == "scale" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(again.eval()), expected, **near)
    for use_cache in (True, False):
        assert torch.equal(again.generate(INPUT_IDS, use_cache=use_cache, **OPTIONS), generated)


@pytest.mark.parametrize("is_from_hub", [True, False], ids=["from_hub", "from_config"])
@pytest.mark.parametrize("operator", ["linear", "down_proj"])
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_are_saved_and_found_as_the_hub_has_them(family, operator, is_from_hub, tmp_path):
    """In memory they are packed: a model that `from_pretrained` made remembers how they were in its checkpoint."""
    stock = make_stock(family, **WITH_EXPERTS[family])
    if is_from_hub:
        stock.save_pretrained(tmp_path / "stock")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    model = make_repl(stock, operator=operator, **{**SPANS, "spans": [[1, 3]]})
    expected = logits(model)
    for name in ("unfolded", "folded"):
        folder = tmp_path / name
        model.save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert any(".experts.0." in key for key in file.keys())  # noqa: SIM118
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-4)
        if name == "unfolded":
            model = model.merge_and_unload()


def test_only_the_experts_that_a_token_goes_through_cost_arithmetic():
    model = make("mixtral")
    layer, cost = model.model.layers[0], model.surrogate_costs[0]
    attention = sum(p.numel() for p in layer.self_attn.parameters())
    one_expert, router = 3 * 32 * 48, 4 * 32
    assert cost.removed_multiply_adds == 2 * (attention + router + 2 * one_expert)  # two layers, two experts


@pytest.mark.parametrize(
    ("family", "span", "changes"),
    [("gemma2", [2, 3], True), ("smollm3", [2, 3], True), ("smollm3", [2, 6], False), ("llama", [2, 3], False)],
)
def test_runtimes_that_know_a_layer_by_its_number_are_warned_of(family, span, changes, caplog):
    model = make_stock(family, num_hidden_layers=9)
    make_repl(model, operator="scale", init="skip", **{**SPANS, "spans": [span]}).merge_and_unload()
    assert ("takes it from the layers' numbers" in caplog.text) == changes


def test_the_layer_from_which_on_windows_begin_is_counted_anew():
    model = make_stock("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=4)
    remove_layers(model, [1, 2, 5])
    assert model.config.max_window_layers == 2


def seen_at(model, span):
    """Hidden states before and behind a span, and the MLP output and inner activations before it."""
    found = {name: [] for name in ("h", "out", "mlp", "inner")}
    layers = model.model.layers
    handles = [
        layers[span[0]].register_forward_pre_hook(lambda m, a: found["h"].append(a[0])),
        layers[span[1]].register_forward_pre_hook(lambda m, a: found["out"].append(a[0])),
        layers[span[0] - 1].mlp.register_forward_hook(lambda m, a, o: found["mlp"].append(o)),
        layers[span[0] - 1].mlp.down_proj.register_forward_hook(lambda m, a, o: found["inner"].append(a[0])),
    ]
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([value.flatten(0, 1) for value in values]).double() for name, values in found.items()}


def test_down_proj_is_the_closed_form_of_replaceme():
    """`min ||M T + Y - L||` over all T, folded into the projection: Eq 5-7 of arXiv 2505.02819, by `lstsq`."""
    stock = make_stock()
    seen = seen_at(stock, (2, 4))
    rest = seen["h"] - seen["mlp"]
    best = torch.linalg.lstsq(seen["mlp"], seen["out"] - rest).solution
    expected = best.T @ stock.model.layers[1].mlp.down_proj.weight.double()
    folded = make_repl(stock, operator="down_proj", ridge=0, **{**SPANS, "spans": [[2, 4]]}).merge_and_unload()
    torch.testing.assert_close(folded.model.layers[1].mlp.down_proj.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_refit_is_least_squares_on_the_inner_activations():
    stock = make_stock()
    seen = seen_at(stock, (2, 4))
    best = torch.linalg.lstsq(seen["inner"], seen["out"] - seen["h"] + seen["mlp"]).solution.T
    folded = make_repl(stock, operator="refit", ridge=0, **{**SPANS, "spans": [[2, 4]]}).merge_and_unload()
    torch.testing.assert_close(folded.model.layers[1].mlp.down_proj.weight.double(), best, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("operator", ["down_proj", "refit", "scale", "patch"])
def test_a_great_ridge_or_skip_is_plain_removal(operator):
    plain = make_stock()
    remove_layers(plain, [1, 2, 4])
    torch.testing.assert_close(logits(make(operator=operator, init="skip").merge_and_unload()), logits(plain))
    if operator in ("down_proj", "refit"):
        torch.testing.assert_close(logits(make(operator=operator, ridge=1e9)), logits(plain), rtol=1e-4, atol=1e-4)


def test_scale_and_patch_are_the_growth_of_the_hidden_states():
    stock = make_stock()
    seen = seen_at(stock, (2, 4))
    growth = (seen["out"].norm(dim=1) / seen["h"].norm(dim=1)).mean()
    one = {**SPANS, "spans": [[2, 4]]}
    scale = make_repl(make_stock(), operator="scale", **one)
    assert scale.surrogates[2].coefficients.item() + 1 == pytest.approx(growth.item(), rel=1e-5)
    patch = make_repl(make_stock(), operator="patch", **one)
    turn = rotation(32)
    ratio = (seen["out"] @ turn.T).abs().mean(0) / (seen["h"] @ turn.T).abs().mean(0)
    expected = turn.T @ torch.diag(ratio) @ turn - torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(patch.surrogates[2].coefficients.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_patch_says_that_no_stock_layer_holds_it(caplog):
    folded = make(operator="patch").merge_and_unload()
    assert folded.config.model_type == "repl" and "no stock layer" in caplog.text


@pytest.mark.parametrize("size", [1, 32, 36, 45])
def test_the_rotation_is_orthogonal_and_spreads(size):
    matrix = rotation(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    if size == 32:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 32**-0.5))


def test_one_surrogate_of_the_older_operators_for_a_span():
    """Its target is the output of the span's last layer, for the input of its first."""
    stock, repl = make_stock(), make_repl(**{**SPANS, "spans": [[1, 3]]})
    seen = seen_at(stock, (1, 3))
    layers = find_layers(stock)
    fit = _LinearFit(repl.surrogates[1], *(Neighbour(layers[i], stock.config, "llama") for i in (0, 3)), ridge=0.1)
    found = repl.surrogates[1].coefficients.clone()
    fit.add(seen["h"].float(), (seen["out"] - seen["h"]).float())
    fit.finish()
    torch.testing.assert_close(fit.operator.coefficients, found, rtol=1e-3, atol=1e-4)
    assert [cost.removed_parameters for cost in repl.surrogate_costs] == [
        2 * sum(p.numel() for p in stock.model.layers[1].parameters())
    ]


def test_folding_leaves_parameters_as_plain_removal_has_them():
    plain = make_stock()
    remove_layers(plain, [1, 2, 4])
    model = make()
    assert [cost.parameters for cost in model.surrogate_costs] == [0, 0]
    folded = model.merge_and_unload()
    assert {n: p.shape for n, p in folded.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())


def test_a_folded_model_loads_where_this_package_is_not(tmp_path):
    folded = make("mixtral").merge_and_unload()
    folded.save_pretrained(tmp_path)
    torch.save(logits(folded), tmp_path / "logits.pt")
    program = (
        "import sys, torch; sys.modules['lopt_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"expected = torch.load({str(tmp_path / 'logits.pt')!r}, weights_only=True)\n"
        "torch.testing.assert_close(model(torch.arange(3, 27).reshape(2, 12)).logits, expected)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_adapters_are_merged_first():
    from peft import LoraConfig, get_peft_model

    model = make()
    get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="merge them with its own merge_and_unload"):
        model.merge_and_unload()


def test_a_folded_model_trains(tmp_path):
    model = make().merge_and_unload().train()
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())


class TestChoosing:
    def test_the_error_is_that_of_the_fit_on_what_it_did_not_see(self):
        stock, data = make_stock(), batches(4)  # sixteen sequences, of which the eighth and the last are held out
        seen = []
        make_one = lambda span: (  # noqa: E731
            make_repl(make_stock(), operator="scale", **{**SPANS, "spans": [list(span)]}).surrogates[span[0]],
            tuple(Neighbour(stock.model.layers[i], stock.config, "llama") for i in (span[0] - 1, span[1])),
        )
        (found,), _ = fit_and_measure(stock, {(2, 4): make_one((2, 4))}, data, 0.0)
        hook = stock.model.layers[2].register_forward_pre_hook(lambda m, a: seen.append([a[0]]))
        other = stock.model.layers[4].register_forward_pre_hook(lambda m, a: seen[-1].append(a[0]))
        with torch.no_grad():
            for batch in data:
                stock(**batch)
        hook.remove(), other.remove()
        h, out = (torch.cat([pair[i] for pair in seen]) for i in (0, 1))
        held = torch.arange(16) % 8 == 7
        factor = (out[~held].norm(dim=-1) / h[~held].norm(dim=-1)).mean()
        last, ids = [], torch.cat([batch["input_ids"] for batch in data])[held]
        stock.model.layers[5].register_forward_hook(lambda m, a, o: last.append(o))
        with torch.no_grad():
            stock(ids)
            remove_layers(stock, [2, 3])
            stock.model.layers[2].register_forward_pre_hook(lambda m, a: (factor * a[0], *a[1:]))
            stock(ids)
        errors = 1 - torch.cosine_similarity(*last, dim=-1)
        assert found == pytest.approx(errors.mean().item(), rel=1e-3)

    def test_the_span_of_layers_that_do_nothing_is_found_by_every_criterion(self):
        for criterion in ("error", "influence", "angle"):
            stock = make_stock()
            with torch.no_grad():
                for layer in stock.model.layers[2:4]:
                    layer.mlp.down_proj.weight.mul_(1e-3)
                    layer.self_attn.o_proj.weight.mul_(1e-3)
            chosen = {"num_layers_to_replace": 2, "placement": "span", "layers_to_replace": None}
            model = make_repl(stock, operator="down_proj", span_criterion=criterion, **chosen)
            assert model.config.repl["removed"] == [2, 3], criterion

    @pytest.mark.parametrize("operator", ["down_proj", "scale", "linear"])
    def test_what_the_choice_has_fitted_is_not_fitted_again(self, operator, monkeypatch):
        chosen = {"num_layers_to_replace": 2, "placement": "span", "layers_to_replace": None}
        with monkeypatch.context() as patched:
            patched.setattr(mapping, "calibrate", None)
            model = make_repl(operator=operator, **chosen)
        first, *_, last = model.config.repl["removed"]
        named = make_repl(operator=operator, layers_to_replace=None, spans=[[first, last + 1]])
        torch.testing.assert_close(logits(model), logits(named), rtol=1e-4, atol=1e-5)

    def test_errors_are_measured_without_dropout(self):
        stock, data = make_stock("gpt2", resid_pdrop=0.1), batches(4)
        layers = find_layers(stock)
        found = []
        for mode in (False, True):
            beside = tuple(Neighbour(layers[i], stock.config, "gpt2") for i in (1, 3))
            operator = make_operator(RepLConfig(operator="scale", spans=[[2, 3]]), *beside)
            found += fit_and_measure(stock.train(mode), {(2, 3): (operator, beside)}, data, 0.0)[0]
            assert stock.training == mode
        assert found[0] == found[1]

    def test_angles_are_shares_of_half_a_turn(self):
        stock = make_stock()
        seen = seen_at(stock, (1, 3))
        cosine = torch.cosine_similarity(seen["h"], seen["out"], dim=-1)
        (angle,) = span_angles(stock, [(1, 3)], batches())
        assert angle == pytest.approx((cosine.acos() / torch.pi).mean().item(), rel=1e-4)

    def test_layers_of_least_influence_make_spans(self):
        chosen = {"num_layers_to_replace": 3, "placement": "influence", "layers_to_replace": None}
        model = make_repl(operator="down_proj", **chosen)
        assert len(model.config.repl["removed"]) == 3 and model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("settings", "family", "message"),
    [
        ({"spans": [[1, 3], [2, 4]]}, "llama", r"\[1, 3\] and \[2, 4\] overlap"),
        ({"spans": [[1, 3], [3, 4]]}, "llama", r"touch, .* make them one, \[1, 4\]"),
        ({"spans": [[0, 2]]}, "llama", r"\[0, 2\] must lie within \[1, 5\] in a model with 6 layers"),
        ({"spans": [[4, 6]]}, "llama", r"\[4, 6\] must lie within"),
        ({"spans": [[1, 3]]}, "gemma2", r"crosses a change of layer type, from full_attention .* at layer 2"),
        (
            {"spans": [[2, 4]]},
            "qwen3_moe",
            "crosses a change of layer type, from Qwen3MoeSparseMoeBlock to Qwen3MoeMLP",
        ),
        ({"spans": [[1, 2]]}, "gemma2", "operator='down_proj' folds a map into .* a norm comes behind it"),
        ({"spans": [[1, 2]], "operator": "refit"}, "mixtral", "operator='refit' .* mixture of experts"),
        (
            {"num_layers_to_replace": 2, "placement": "span", "operator": "refit"},
            "mixtral",
            "operator='refit' .* mixture of experts",
        ),
        ({"num_layers_to_replace": 1, "placement": "influence"}, "gemma2", "a norm comes behind it"),
        ({"num_layers_to_replace": 5, "placement": "span"}, "llama", "num_layers_to_replace=5 .* from 1 to 4"),
        ({"num_layers_to_replace": 5, "placement": "influence"}, "llama", "num_layers_to_replace=5 .* from 1 to 4"),
        ({"num_layers_to_replace": 2, "placement": "span"}, "gemma2", "num_layers_to_replace=2 .* from 1 to 1"),
    ],
)
def test_spans_that_do_not_fit_a_model(settings, family, message):
    model = make_stock(family, **WITH_EXPERTS.get(family, {}))
    model.base_model.forward = None  # all of it is found before any forward
    with pytest.raises(ValueError, match=message):
        make_repl(model, **{"operator": "down_proj", "layers_to_replace": None, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spans": [[3, 3]]}, r"spans=\[\[3, 3\]\] must list pairs \[first, end\] of layers, like \[\[14, 18\]\]"),
        ({"spans": "14-18"}, "spans='14-18' must list pairs"),
        ({"spans": [[1, 2]], "num_layers_to_replace": 1}, "two ways to say which layers"),
        ({"spans": [[1, 2]], "operator": "scale", "init": "paper"}, "init='paper' is RepL's"),
        ({"placement": "span"}, "num_layers_to_replace is missing; .* placement='span'"),
        (
            {"placement": "influence", "num_layers_to_replace": 2, "span_criterion": "angle"},
            "span_criterion='angle' has no effect with placement='influence'",
        ),
        (
            {"num_layers_to_replace": 1, "every": 3},
            "every=3 has no effect with placement='block_influence'; leave it out, or set that to 'every'.",
        ),
        ({"spans": [[1, 2]], "span_criterion": "influence"}, "span_criterion='influence' has no effect where the lay"),
        ({"spans": [[1, 2]], "operator": "scale", "detach_sources": False}, "detach_sources=False lets gradients"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        RepLConfig(**settings)


def test_too_few_calibration_tokens():
    few = [{"input_ids": torch.ones(1, 20, dtype=torch.long)}]
    for operator, width in (("down_proj", 32), ("refit", 48)):
        with pytest.raises(ValueError, match=f"has 20 tokens, but operator='{operator}' fits a map of {width} inputs"):
            get_repl_model(make_stock(), RepLConfig(operator=operator, spans=[[1, 3]]), few)
    with pytest.raises(ValueError, match="has 1 sequences, but span_criterion='error'"):
        one = [{"input_ids": torch.ones(1, 60, dtype=torch.long)}]
        get_repl_model(make_stock(), RepLConfig(operator="scale", num_layers_to_replace=2, placement="span"), one)


def test_tokens_are_counted_not_numbers():
    """Of images the patches and the class token, of embeddings the positions."""
    images, vit = [{"pixel_values": torch.zeros(1, 3, 16, 16)}], make_vit()  # 768 numbers, 17 tokens
    embedded = [{"inputs_embeds": torch.zeros(2, 10, 32)}]  # 640 numbers, 20 tokens
    config = RepLConfig(operator="down_proj", spans=[[1, 3]])
    for model, data, count in ((vit, images, 17), (make_stock(), embedded, 20)):
        with pytest.raises(ValueError, match=f"has {count} tokens"):
            check_enough_tokens(config, model, data)
    check_enough_tokens(config, vit, 2 * images)


def test_a_gguf_of_a_folded_model_loads_again(tmp_path):
    """Written under llama.cpp's names (heads' rows as it has them), read by transformers' own reader."""
    gguf = pytest.importorskip("gguf")
    folded = make().merge_and_unload()
    config = folded.config
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in folded.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp rotates neighbouring channels, transformers halves
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    assert again.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(again), logits(folded), rtol=1e-4, atol=1e-4)
