"""Surgery, calibration, generation, saving and folding of whole models."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from lopt_hf import RepLConfig, RepLModel, get_repl_model
from lopt_hf.repl.calibration import _LinearFit
from lopt_hf.repl.export import save_with_code
from lopt_hf.repl.modeling_repl import find_layers
from lopt_hf.repl.neighbours import Neighbour
from lopt_hf.repl.operators import Linear
from lopt_hf.repl.surgery import remove_layers
from tests.repl.helpers import FAMILIES, INPUT_IDS, REMOVED, batches, logits, make_repl, make_stock, make_vit
from tests.tiny import make_tokenizer

OPERATORS = [
    {"operator": "linear"},
    {"operator": "branches"},
    {"operator": "branches", "branches": ["identity", "value", "mlp"]},
    {"operator": "branches", "branches": ["value", "output"], "coefficients": "head"},
    {"operator": "proj", "init": "paper"},
    {"operator": "head"},
    {"operator": "mlp", "init": "paper"},
    {"operator": "head+mlp"},
]


def families_and_operators():
    """Every operator on two families, the default on all of them."""
    pairs = [("llama", each) for each in OPERATORS] + [("gpt2", each) for each in OPERATORS]
    return pairs + [(family, each) for family in FAMILIES for each in OPERATORS[:2] if family not in ("llama", "gpt2")]


def left_padded():
    ids = INPUT_IDS.clone()
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_four_things_stay_in_step(family):
    model = make_repl(make_stock(family))
    layers, config = find_layers(model), model.config
    assert len(layers) == config.num_hidden_layers == 4
    lists = {name: values for name, values in config.to_dict().items() if name in ("layer_types", "no_rope_layers")}
    kept = [index for index in range(6) if index not in REMOVED]
    stock = make_stock(family).config.to_dict()
    for name, values in lists.items():
        assert values is None or values == [stock[name][index] for index in kept]
    slots = [m.layer_idx for layer in layers for m in layer.modules() if isinstance(vars(m).get("layer_idx"), int)]
    assert sorted(set(slots)) == [0, 1, 2, 3] and slots == sorted(slots)
    with torch.no_grad():
        cache = model(INPUT_IDS, use_cache=True).past_key_values
    assert len(cache.layers) == 4 and all(layer.get_seq_length() == 12 for layer in cache.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_cache_equals_generation_without(family):
    model = make_repl(make_stock(family))
    for sampled in (False, True):
        generated = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": sampled, "use_cache": use_cache}
            generated.append(model.generate(**left_padded(), **options))
        assert torch.equal(*generated)


def test_left_padding_does_not_change_the_answer():
    model = make_repl()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    batch = left_padded()
    alone = model.generate(batch["input_ids"][:1, 4:], **options)[:, 8:]
    assert torch.equal(model.generate(**batch, **options)[:1, 12:], alone)


@pytest.mark.parametrize(("family", "settings"), families_and_operators())
def test_saved_loaded_and_folded_models_are_the_same(family, settings, tmp_path):
    model = make_repl(make_stock(family), **settings)
    expected, options = logits(model), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    generated = model.generate(INPUT_IDS, **options)
    model.save_pretrained(tmp_path / "unfolded")
    loaded = RepLModel.from_pretrained(tmp_path / "unfolded").eval()
    assert isinstance(loaded, RepLModel) and isinstance(loaded, type(make_stock(family)))
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(loaded.generate(INPUT_IDS, **options), generated)
    folded = loaded.merge_and_unload()
    torch.testing.assert_close(logits(folded), expected, rtol=1e-5, atol=1e-5)
    folded.save_pretrained(tmp_path / "folded")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again.eval()), logits(folded))
    assert torch.equal(again.generate(INPUT_IDS, **options), generated)


def test_skip_is_plain_removal():
    plain = make_stock()
    remove_layers(plain, REMOVED)
    for operator in ("linear", "branches", "proj", "head"):
        torch.testing.assert_close(logits(make_repl(operator=operator, init="skip")), logits(plain))


@pytest.mark.parametrize("operator", ["linear", "branches", "proj", "head"])
def test_calibration_is_never_worse_than_skip_on_its_own_data(operator):
    """Mean square error of the lowest surrogate, whose input is the stock model's."""
    stock, data, seen = make_stock(), batches(), []
    stock.model.layers[1].register_forward_hook(lambda m, a, o: seen.append((a[0], o)))
    repl = get_repl_model(
        copy.deepcopy(stock), RepLConfig(operator=operator, layers_to_replace=REMOVED, ridge=0), data
    )
    seen.clear()
    with torch.no_grad():
        for batch in data:
            stock(**batch)
        hook = repl.hooks[0]
        errors = [(repl.surrogates[1](h, hook.previous, hook.following) - out).pow(2).mean() for h, out in seen]
        skipped = [(h - out).pow(2).mean() for h, out in seen]
    assert sum(errors) < sum(skipped)
    if operator == "linear":  # 192 tokens determine its 33 x 32 entries
        assert sum(errors) < 0.7 * sum(skipped)


def test_later_fits_see_the_earlier_surrogates():
    """Fitted alone, the upper surrogate sees another input than behind the lower one."""
    both, alone = make_repl(), make_repl(layers_to_replace=[4])
    assert not torch.equal(both.surrogates[4].coefficients, alone.surrogates[4].coefficients)
    assert torch.equal(both.surrogates[1].coefficients, make_repl(layers_to_replace=[1]).surrogates[1].coefficients)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_upper_fit_is_that_of_a_forward_from_the_embeddings(family):
    """The calibration does not run the layers below a fitted surrogate again; nothing depends on that."""
    seen, data, repl = [], batches(), make_repl(make_stock(family))
    stock, low, upper = make_stock(family), repl.surrogates[1], repl.surrogates[4]
    layers, hook = find_layers(stock), repl.hooks[0]
    layers[1].register_forward_hook(lambda m, a, o: low(a[0], hook.previous, hook.following))
    layers[4].register_forward_hook(lambda m, a, o: seen.append((a[0], o - a[0])))
    with torch.no_grad():
        for batch in data:
            stock(**batch)
    h, added = (torch.cat([pair[i].flatten(0, 1) for pair in seen]) for i in (0, 1))
    beside = [Neighbour(layers[index], stock.config, family) for index in (3, 5)]
    fit = _LinearFit(Linear(*beside), *beside, ridge=0.1)
    fit.add(h, added)
    fit.finish()
    torch.testing.assert_close(upper.coefficients, fit.operator.coefficients, rtol=1e-3, atol=1e-4)
    assert [type(layer) for layer in find_layers(repl)] == [type(layers[0])] * 4, "the layers are back in their places"


def test_linear_calibration_is_least_squares():
    stock, data, seen = make_stock(), batches(), []
    handle = stock.model.layers[1].register_forward_hook(lambda m, a, o: seen.append((a[0], o - a[0])))
    with torch.no_grad():
        for batch in data:
            stock(**batch)
    handle.remove()
    h, added = (torch.cat([pair[i].flatten(0, 1) for pair in seen]).double() for i in (0, 1))
    x = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + stock.config.rms_norm_eps)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), added).solution
    operator = make_repl(stock, ridge=0.0).surrogates[1]
    torch.testing.assert_close(operator.coefficients.double().T, expected[:-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(operator.bias.double(), expected[-1], rtol=1e-3, atol=1e-4)


def test_a_config_read_from_a_file_changes_its_type_too(tmp_path):
    make_stock().save_pretrained(tmp_path / "stock")
    model = make_repl(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"))
    assert model.config.model_type == "repl_unfolded"
    model.save_pretrained(tmp_path / "unfolded")
    folded = RepLModel.from_pretrained(tmp_path / "unfolded").merge_and_unload()
    assert folded.config.model_type == "repl"
    save_with_code(folded, tmp_path / "folded")


def test_folding_keeps_nothing_of_the_neighbours_twice():
    model = make_repl(operator="branches")
    stock = make_stock()
    remove_layers(stock, REMOVED)
    folded = model.merge_and_unload()
    own = sum(p.numel() for p in folded.parameters()) - sum(p.numel() for p in stock.parameters())
    assert own == len(REMOVED) * (32 * 32 + 32)  # a map and a scale


def test_hidden_states_and_deepcopy():
    model = make_repl()
    with torch.no_grad():
        assert len(model(INPUT_IDS, output_hidden_states=True).hidden_states) == 5
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert logits(twin).any(), "the copy's surrogates still read the original's layers"


def test_trainable_parameters(capsys):
    model = make_repl(operator="branches", trainable="coefficients")
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == 2 * 3 * 32 and everything == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 192 || all params:")


def test_costs_are_those_of_the_removed_layers():
    removed = sum(p.numel() for p in make_stock().model.layers[1].parameters())
    costs = make_repl().surrogate_costs
    assert [cost.layer for cost in costs] == REMOVED
    assert all(cost.removed_parameters == removed for cost in costs)


def test_costs_of_layers_of_another_kind_than_the_one_behind():
    stock = make_stock("qwen3_moe", num_hidden_layers=8, mlp_only_layers=[0, 4, 5])
    removed = [sum(p.numel() for p in layer.parameters()) for layer in stock.model.layers[2:4]]
    (cost,) = make_repl(stock, operator="patch", layers_to_replace=None, spans=[[2, 4]]).surrogate_costs
    assert cost.removed_parameters == sum(removed)


def test_an_upload_has_the_code_too(tmp_path, monkeypatch):
    uploaded = {}
    monkeypatch.setattr(
        "transformers.utils.hub.hf_api",
        lambda *args, **kwargs: SimpleNamespace(
            create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id)
        ),
    )
    monkeypatch.setattr("transformers.modeling_utils.hf_api", transformers.utils.hub.hf_api)
    folded = make_repl().merge_and_unload()

    def upload(folder, repo_id, *args, **kwargs):
        uploaded[repo_id] = ({path.name for path in Path(folder).iterdir()}, kwargs["commit_message"])

    monkeypatch.setattr(folded, "_upload_modified_files", upload)
    folded.save_pretrained(tmp_path / "named", push_to_hub=True, repo_id="org/model", commit_message="Fold")
    folded.save_pretrained(tmp_path / "unnamed", push_to_hub=True)
    code = {"configuration_repl.py", "modeling_repl.py"}
    assert {name: message for name, (_, message) in uploaded.items()} == {"org/model": "Fold", "unnamed": None}
    assert all(files > code for files, _ in uploaded.values())
    assert code < {path.name for path in (tmp_path / "named").iterdir()}


def test_int8_dynamic_quantisation_of_the_folded_model():
    folded = make_repl().merge_and_unload()
    expected = logits(folded)
    quantised = torch.ao.quantization.quantize_dynamic(folded, {torch.nn.Linear}, dtype=torch.qint8)
    surrogate = find_layers(quantised)[1].surrogate
    assert "quantized" in type(surrogate.linear).__module__
    error = (logits(quantised) - expected).norm() / expected.norm()
    assert 0 < error < 0.2


def test_exported_model_loads_without_this_package(tmp_path):
    folded = make_repl(operator="branches", branches=["identity", "value", "mlp"]).merge_and_unload()
    save_with_code(folded, tmp_path)
    torch.save(logits(folded), tmp_path / "logits.pt")
    program = (
        "import sys, torch; sys.modules['lopt_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()\n"
        f"expected = torch.load({str(tmp_path / 'logits.pt')!r}, weights_only=True)\n"
        "assert torch.equal(model(torch.arange(3, 27).reshape(2, 12)).logits, expected)\n"
        "model.generate(torch.arange(3, 27).reshape(2, 12), max_new_tokens=4)\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    environment |= {name: os.environ[name] for name in os.environ if name.startswith(("ATEN_CPU", "ONEDNN_MAX_CPU"))}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


ROUND_TRIPS = """
import pickle, sys, torch
sys.modules["lopt_hf"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, what = sys.argv[1:]
load = lambda path, **how: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **how).eval()
logits = lambda model: model(torch.arange(3, 27).reshape(2, 12)).logits
if what == "torchao":
    from transformers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig
    model = load(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
elif what == "bitsandbytes":
    from transformers import BitsAndBytesConfig
    model = load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
else:
    model = load(folder)
    before = logits(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    logits(model).square().mean().backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)
# transformers 5.23 cannot save a quantised checkpoint that it has loaded, of a stock model either
for trip in ("first", "second") if what == "finetune" else ("first",):
    expected = logits(model)
    if what == "finetune":  # a quantiser's tensors say of themselves whether they can be pickled
        model = pickle.loads(pickle.dumps(model))
        assert torch.equal(logits(model), expected)
    model.save_pretrained(f"{folder}-{trip}")
    model = load(f"{folder}-{trip}")
    assert torch.equal(logits(model), expected), trip
assert AutoTokenizer.from_pretrained(folder).vocab_size
"""


@pytest.mark.parametrize("what", ["finetune", "torchao", "bitsandbytes"])
def test_an_export_goes_round_without_this_package(what, tmp_path):
    """Loaded, changed, pickled, saved and loaded again, twice; all by its own code."""
    if what != "finetune":
        pytest.importorskip(what)
    folded = make_repl(operator="branches", branches=["identity", "value", "mlp"]).merge_and_unload()
    save_with_code(folded, tmp_path / "export", make_tokenizer())
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", ROUND_TRIPS, str(tmp_path / "export"), what]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("is_folded", [True, False])
def test_a_process_that_has_made_no_class_yet_unpickles_a_model(is_folded, tmp_path):
    model = make_repl()
    model = model.merge_and_unload() if is_folded else model.eval()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save(logits(model), tmp_path / "logits.pt")
    program = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open('model.pkl', 'rb'))\n"
        "with torch.no_grad():\n"
        "    found = model(torch.arange(3, 27).reshape(2, 12)).logits\n"
        "assert torch.equal(found, torch.load('logits.pt'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_tokenizer_of_where_a_model_came_from_goes_with_it(tmp_path, caplog):
    make_stock().save_pretrained(tmp_path / "stock")
    make_tokenizer().save_pretrained(tmp_path / "stock")
    folded = make_repl(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")).merge_and_unload()
    save_with_code(folded, tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").get_vocab() == make_tokenizer().get_vocab()
    save_with_code(make_repl().merge_and_unload(), tmp_path / "none")  # made here, with no folder to look in
    assert (tmp_path / "none/model.safetensors").is_file() and "no tokenizer was found" in caplog.text


@pytest.mark.parametrize("first", ["import lopt_hf, transformers", "import transformers, lopt_hf"])
def test_auto_classes_know_the_models_once_the_package_is_imported(first, tmp_path):
    make_repl().save_pretrained(tmp_path / "unfolded")
    make_repl().merge_and_unload().save_pretrained(tmp_path / "folded")
    program = (
        f"{first}\nimport sys\n"
        "print('torch' in sys.modules)\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        f"for name in ('unfolded', 'folded'):\n"
        f"    print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + '/' + name)).__name__)\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-2:] == ["RepLLlamaForCausalLM", "FoldedRepLLlamaForCausalLM"]


def test_lm_eval_loads_a_folded_model(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = make_repl()
    expected = logits(model, input_ids=torch.tensor([[3, 4, 5]])).log_softmax(-1)[0, [0, 1], [4, 5]].sum().item()
    model.merge_and_unload().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    lm = HFLM(pretrained=str(tmp_path), device="cpu", add_bos_token=False)
    request = Instance("loglikelihood", {}, ("a", "bc"), 0)
    assert lm.loglikelihood([request], disable_tqdm=True)[0][0] == pytest.approx(expected, rel=1e-4)


def test_importing_the_package_imports_no_torch():
    program = "import lopt_hf, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


@pytest.mark.parametrize("settings", OPERATORS[:3] + OPERATORS[5:])
def test_vit(settings, tmp_path):
    stock = make_vit()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": images}]
    model = get_repl_model(stock, RepLConfig(layers_to_replace=REMOVED, **settings), data)
    expected = logits(model, pixel_values=images)
    model.save_pretrained(tmp_path / "unfolded")
    assert torch.equal(logits(RepLModel.from_pretrained(tmp_path / "unfolded").eval(), pixel_values=images), expected)
    folded = model.merge_and_unload()
    torch.testing.assert_close(logits(folded, pixel_values=images), expected, rtol=1e-5, atol=1e-5)
    folded.save_pretrained(tmp_path / "folded")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "folded").eval()
    assert torch.equal(logits(again, pixel_values=images), logits(folded, pixel_values=images))


def test_vit_by_block_influence():
    data = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 3])}]
    model = get_repl_model(make_vit(), RepLConfig(num_layers_to_replace=2), data)
    assert len(find_layers(model)) == 4
    model(**data[0]).loss.backward()
    assert all(operator.coefficients.grad is not None for operator in model.surrogates.values())


def test_saved_config_is_readable_without_weights(tmp_path):
    make_repl().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).repl["removed"] == REMOVED
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "repl_unfolded"
