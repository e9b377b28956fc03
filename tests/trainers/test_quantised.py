"""LoRA on quantised weights, as a user asks for it: bitsandbytes in 4 and 8 bit, torchao in 8."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from lopt_hf import cli
from tests.scripts.test_training import arguments
from tests.tiny import make_model
from tests.trainers.helpers import KINDS, kind_kwargs, make_trainer, one_step_gradients, snapshot, training_args
from tests.trainers.oracle import assert_gradients, block_gradients

INPUT_IDS = torch.arange(3, 27).reshape(2, 12)
REACH = {"local_objective": "none", "num_blocks": 3, "task_reach": 3}


def needs(package):
    reason = f"needs {package}: pip install 'lopt_hf[quantised]'"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


def quantisation(kind):
    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "8 bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


quantised = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("4 bit", marks=needs("bitsandbytes")),
        pytest.param("8 bit", marks=needs("bitsandbytes")),
        pytest.param("torchao int8", marks=needs("torchao")),
    ],
)


@pytest.fixture
def base(tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def load(base, kind):
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=quantisation(kind), dtype=torch.float32)


def given(kind):
    torch.manual_seed(0)  # of the adapter
    peft_config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    return {"peft_config": peft_config, "quantization_config": quantisation(kind)}


def make_ours(folder, base, kind, **settings):
    """From a model's folder, which the trainer loads and quantises."""
    init = {"model_init_kwargs": {"dtype": torch.float32}}
    return make_trainer(folder, base, trainer_kwargs=given(kind), **init, **settings)


def make_stock(folder, base, kind, **settings):
    """TRL's trainer, likewise."""
    args = training_args(folder, model_init_kwargs={"dtype": torch.float32}, **settings)
    sft = KINDS["sft"]
    return sft.stock_trainer(base, sft.stock_config(**args), **kind_kwargs("sft", base, given(kind)))


@quantised
@pytest.mark.parametrize("mode", ["joint", "eager"])
def test_gradients_are_autograds(base, tmp_path, kind, mode):
    """Those of each block's loss in the whole graph of TRL's trainer of the same quantised model."""
    trainer = make_ours(tmp_path / "ours", base, kind, num_blocks=3, local_backward=mode)
    torch.manual_seed(0)
    found = one_step_gradients(trainer)
    assert_gradients(found, block_gradients(make_stock(tmp_path / "stock", base, kind), trainer))


@quantised
def test_full_reach_with_recomputation_is_the_stock_trainer(base, tmp_path, kind):
    ours = make_ours(tmp_path / "ours", base, kind, clip_scope="global", **REACH)
    stock = make_stock(tmp_path / "stock", base, kind)
    assert ours.boundary._replays is not None
    before = snapshot(ours)
    for trainer in (ours, stock):
        torch.manual_seed(1)
        trainer.train()
    expected = {name: p.detach() for name, p in stock.model.named_parameters() if p.requires_grad}
    assert all(not torch.equal(before[name], weight) for name, weight in expected.items())
    for name, weight in snapshot(ours).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


@quantised
def test_the_adapter_is_saved_loaded_and_merged(base, tmp_path, kind):
    trainer = make_ours(tmp_path / "ours", base, kind)
    before = snapshot(trainer)
    trainer.train()
    assert [name for name, weight in snapshot(trainer).items() if torch.equal(before[name], weight)] == []
    trainer.save_model(tmp_path / "saved")
    adapted = PeftModel.from_pretrained(load(base, kind), tmp_path / "saved", is_trainable=True)
    trained = {name: weight for name, weight in snapshot(trainer).items() if not name.startswith("head.")}
    loaded = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name].float(), weight.float()) for name, weight in trained.items())
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved").eval()
    with torch.no_grad():
        # With bitsandbytes TRL trains the adapter in bfloat16, and PEFT loads it in float32.
        logits = trainer.model.eval()(INPUT_IDS).logits
        assert (adapted.eval()(INPUT_IDS).logits - logits).norm() < 0.05 * logits.norm()
        apart = plain(INPUT_IDS).logits
        torch.testing.assert_close(plain.merge_and_unload()(INPUT_IDS).logits, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option", [pytest.param(f"load_in_{bits}bit", marks=needs("bitsandbytes")) for bits in (4, 8)]
)
def test_the_command(tmp_path, option, capsys):
    options = {option: True, "use_peft": True, "lora_target_modules": ["all-linear"], "task_reach": "[1,2]"}
    cli.main(["sft", *arguments(tmp_path, "sft", dtype="float32", **options)])
    config = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out"
    ).peft_config["default"]
    assert "up_proj" in config.target_modules
