"""One clear error each: it names the field, its value and the fix."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    ResNetConfig,
    ResNetModel,
    ViTModel,
)
from trl import ModelConfig, SFTConfig, SFTTrainer

from lopt_hf import LoPTConfig, LoPTTrainer, RepLConfig, RepLModel, RepLTrainer, get_repl_model
from lopt_hf.repl.export import save_with_code
from lopt_hf.repl.trainer import HealingConfig, heal
from tests.repl.helpers import batches, make_repl, make_stock, make_vit
from tests.tiny import make_dataset, make_model, make_tokenizer
from tests.trainers.helpers import training_args


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operator": "liner"}, "operator='liner' is unknown, nearest is 'linear'"),
        ({"init": "zero"}, "init='zero' is unknown"),
        ({"placement": "evry"}, "placement='evry' is unknown, nearest is 'every'"),
        ({"every": 1, "placement": "every"}, "every=1 is too small; set it to 2"),
        ({"ridge": -0.1}, "ridge=-0.1 must be a number from 0 on"),
        ({"ridge": float("nan")}, "ridge=nan must be"),
        ({"num_layers_to_replace": None}, "num_layers_to_replace is missing"),
        ({"layers_to_replace": [2]}, "two ways to say which layers"),
        ({"placement": "every"}, "num_layers_to_replace=2 has no effect"),
        ({"num_layers_to_replace": None, "layers_to_replace": 2}, r"layers_to_replace=2 must list .* like \[14, 17\]"),
        (
            {"num_layers_to_replace": None, "layers_to_replace": [2.0]},
            r"layers_to_replace=\[2.0\] must list whole num",
        ),
        ({"operator": "mlp", "init": "paper", "trainable": "coefficients"}, "trainable='coefficients' leaves nothing"),
        ({"operator": "mlp"}, "operator='mlp' has no coefficients .* set init to 'paper'"),
        ({"operator": "branches", "branches": ["vlaue"]}, r"branches=\['vlaue'\] must name"),
        ({"operator": "branches", "coefficients": "head"}, "coefficients='head' needs branches that have heads"),
    ],
)
def test_config(settings, message):
    with pytest.raises(ValueError, match=message):
        RepLConfig(**{"num_layers_to_replace": 2, **settings})


NAMED = {"layers_to_replace": [2]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {**NAMED, "placement": "every"},
            "placement='every' has no effect: it chooses layers, which are named; leave",
        ),
        ({**NAMED, "every": 9}, "every=9 has no effect: it chooses layers"),
        ({**NAMED, "coefficients": "head"}, "coefficients='head' has no effect: it is of operator 'branches', not of"),
        ({**NAMED, "branches": ["mlp"]}, r"branches=\['mlp'\] has no effect: it is of operator 'branches'"),
        ({**NAMED, "init": "skip", "ridge": 9.0}, "ridge=9.0 has no effect: it is of a fit, and with init='skip'"),
        ({"num_layers_to_replace": 1, "init": "skip", "ridge": 9.0}, "ridge=9.0 has no effect"),
        ({**NAMED, "init": "skip", "calibration_seed": 3}, "calibration_seed=3 has no effect: it cuts calibration"),
        ({"placement": "every", "init": "skip", "calibration_tokens": 64}, "calibration_tokens=64 has no effect"),
    ],
)
def test_options_without_effect(settings, message):
    with pytest.raises(ValueError, match=message):
        get_repl_model(make_stock(), RepLConfig(**settings), batches())


def test_options_with_an_effect():
    """A span is chosen by fits, also where the surrogate that stays does nothing."""
    by_fits = {"placement": "span", "num_layers_to_replace": 1, "init": "skip", "ridge": 9.0}
    assert make_repl(layers_to_replace=None, **by_fits).config.repl["config"]["ridge"] == 9.0
    assert not RepLConfig(
        operator="branches", coefficients="scalar", branches=["mlp"], placement="every", every=2
    ).idle


def test_too_many_layers_are_refused_before_any_forward():
    model = make_stock()
    model.base_model.forward = None
    with pytest.raises(ValueError, match="num_layers_to_replace=3 does not fit a model with 6 layers.*from 1 to 2"):
        get_repl_model(model, RepLConfig(num_layers_to_replace=3), [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "calibration_data is missing"),
        ([], "calibration_data is empty"),
        (Dataset.from_dict({"text": []}), "calibration_data is empty"),
        (7, "calibration_data is a int"),
        (DatasetDict(), "calibration_data is a DatasetDict; pass texts, one split"),
        (["short"], "gives 5 tokens .* less than one sequence of calibration_seq_length=512"),
        (Dataset.from_dict({"question": ["a"]}), r"has the columns \['question'\]"),
        ([{"text": None}], "has a row whose 'text' is None; leave such rows out"),
        ([None], "has a row of type NoneType; pass texts, or rows with columns"),
        (make_tokenizer()(["1", "2"]), "calibration_data is a BatchEncoding; pass .* a list of batches"),
        ([make_tokenizer()(["1", "2"])], "no tensor; call the tokenizer with return_tensors='pt'"),
    ],
)
def test_calibration_data(data, message):
    with pytest.raises(ValueError, match=message):
        get_repl_model(make_stock(), RepLConfig(num_layers_to_replace=1), data, make_tokenizer())


@pytest.mark.parametrize("name", ["calibration_tokens", "calibration_seq_length", "calibration_batch_size"])
def test_what_cuts_texts_has_no_effect_on_batches(name):
    with pytest.raises(ValueError, match=f"{name}=16 cuts sequences from text, but calibration_data are batches"):
        get_repl_model(make_stock(), RepLConfig(num_layers_to_replace=1, **{name: 16}), batches())


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_sequences_longer_than_the_positions_that_were_learned(family):
    config = RepLConfig(num_layers_to_replace=1, calibration_seq_length=129)
    message = "sequences of 129 tokens, but model=.* has learned 128 .* set calibration_seq_length to at most 128"
    with pytest.raises(ValueError, match=message):
        get_repl_model(make_stock(family), config, ["1" * 600], make_tokenizer())
    get_repl_model(make_stock(), config, ["1" * 600], make_tokenizer())


def test_what_needs_calibration_data_is_named():
    by_angle = RepLConfig("scale", placement="span", num_layers_to_replace=1, span_criterion="angle", init="skip")
    with pytest.raises(ValueError, match="missing, but placement='span' must have it; .* or name the layers"):
        get_repl_model(make_stock(), by_angle)
    with pytest.raises(ValueError, match="missing, but init='calibrate' must have it; .* or set init to 'skip'"):
        get_repl_model(make_stock(), RepLConfig("scale", spans=[[1, 3]]))


def test_adapters_that_would_go_around_a_surrogate(tmp_path):
    model = make_repl(make_stock("opt"), operator="down_proj")
    args = HealingConfig(str(tmp_path), report_to="none")
    for targets in (["q_proj", "fc2"], "all-linear", "ALL-LINEAR", ".*[.]fc.", ["q_proj", "1.fc2"]):
        adapters = ModelConfig(use_peft=True, lora_target_modules=targets)
        with pytest.raises(ValueError, match="leave fc2 out of lora_target_modules"):
            heal(model, 0, make_dataset(), args, adapters, make_tokenizer())


def test_adapters_that_leave_the_place_of_a_surrogate_out(tmp_path):
    lora = LoraConfig(target_modules="all-linear", exclude_modules=["fc2"])
    trainer = RepLTrainer(
        make_repl(make_stock("opt"), operator="down_proj"),
        SFTConfig(**training_args(tmp_path)),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=lora,
    )
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in trainer.model.named_modules() if "lora_A" in name
    }
    assert "fc1" in adapted and "fc2" not in adapted


@pytest.mark.parametrize(
    ("operator", "adapters", "message"),
    [
        ("refit", {"use_dora": True, "lora_target_modules": "all-linear"}, "leave down_proj out of lora_target_modul"),
        ("refit", {"lora_modules_to_save": ["down_proj"]}, "has 'down_proj', .*model.layers.0.mlp.down_proj runs"),
        ("refit", {"lora_modules_to_save": ["lm_head", "mlp"]}, "lora_modules_to_save has 'mlp'"),
        ("down_proj", {"lora_modules_to_save": ["mlp"]}, "leave 'mlp' out, or train the whole model"),
        ("branches", {"lora_modules_to_save": ["layers.1"]}, "lora_modules_to_save has 'layers.1'"),
    ],
)
def test_adapters_that_keep_a_surrogate_from_learning_or_merging(operator, adapters, message, tmp_path):
    args = HealingConfig(str(tmp_path), report_to="none")
    model_args = ModelConfig(**{"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], **adapters})
    with pytest.raises(ValueError, match=message):
        heal(make_repl(operator=operator), 0, make_dataset(), args, model_args, make_tokenizer())


def test_adapters_of_a_trainer_of_ones_own(tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["surrogate", "mlp"])
    with pytest.raises(ValueError, match="has 'mlp', of which PEFT trains a copy"):
        RepLTrainer(make_repl(operator="down_proj"), SFTConfig(**training_args(tmp_path)), peft_config=lora)


def test_text_without_a_tokenizer():
    with pytest.raises(ValueError, match="processing_class is missing"):
        get_repl_model(make_stock(), RepLConfig(num_layers_to_replace=1), ["text"])


def test_calibration_data_that_is_not_finite():
    model = make_stock()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        make_repl(model)


CHOICES = [
    {},
    {"placement": "influence"},
    {"placement": "span", "span_criterion": "influence"},
    {"placement": "span", "span_criterion": "angle"},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_hidden_states_that_are_not_finite_choose_nothing(choice):
    model = make_stock()
    model.model.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite, so nothing can be fitted to them or chosen by them"):
        make_repl(model, layers_to_replace=None, num_layers_to_replace=1, init="skip", **choice)


def test_an_unknown_family():
    with pytest.raises(ValueError, match="model_type='falcon' is not supported by RepL; use one of llama"):
        make_repl(make_model("falcon", num_hidden_layers=6))


class OwnLlama(LlamaForCausalLM):
    """A class that `transformers` does not know."""


@pytest.mark.parametrize(
    ("architecture", "make_config", "fix"),
    [
        (LlamaForSequenceClassification, lambda: make_stock(pad_token_id=0).config, "LlamaForCausalLM"),
        (LlamaModel, lambda: make_stock().config, "LlamaForCausalLM"),
        (OwnLlama, lambda: make_stock().config, "LlamaForCausalLM"),
        (ViTModel, lambda: make_vit().config, "ViTForImageClassification"),
        (ResNetModel, lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[3]), "ResNetForImageClassif"),
    ],
)
def test_models_that_could_not_be_loaded_again(architecture, make_config, fix):
    message = f"model={architecture.__name__} could not be loaded again with surrogates; use a {fix}"
    with pytest.raises(ValueError, match=message):
        make_repl(architecture(make_config()))


@pytest.mark.parametrize("is_registered", [False, True])
def test_a_refused_model_keeps_its_weights(is_registered, monkeypatch):
    model = OwnLlama(make_stock().config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    if is_registered:  # an auto class finds it, but not by its name in transformers
        monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, type(model.config), OwnLlama)
    with pytest.raises(ValueError, match="OwnLlama"):
        make_repl(model, operator="down_proj", refit_behind=2)
    assert len(model.model.layers) == 6 and type(model) is OwnLlama
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "option", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_options_that_change_what_a_layer_is(family, option, message):
    with pytest.raises(ValueError, match=message):
        make_repl(make_stock(family, **option))


def test_projections_that_are_not_square():
    with pytest.raises(ValueError, match="operator='proj' applies .* 32 x 64"):
        make_repl(make_stock("qwen3"), operator="proj")


def test_a_model_that_has_surrogates_already():
    with pytest.raises(ValueError, match="already has surrogates"):
        make_repl(make_repl())
    with pytest.raises(ValueError, match="already has surrogates"):
        make_repl(make_repl().merge_and_unload())


@pytest.mark.parametrize(("trainer", "config"), [(SFTTrainer, SFTConfig), (LoPTTrainer, LoPTConfig)])
def test_a_folded_model_is_not_trained(trainer, config, tmp_path):
    args = config(**training_args(tmp_path))
    with pytest.raises(ValueError, match="is folded: .* merge_and_unload"):
        trainer(
            make_repl().merge_and_unload(), args, train_dataset=make_dataset(), processing_class=make_tokenizer()
        ).train()


def test_other_checkpoints_are_refused(tmp_path):
    make_stock().save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="holds a stock model of type 'llama'; load it with AutoModelForCausalLM"):
        RepLModel.from_pretrained(tmp_path / "stock")
    make_repl().merge_and_unload().save_pretrained(tmp_path / "folded")
    with pytest.raises(ValueError, match="holds a folded RepL model"):
        RepLModel.from_pretrained(tmp_path / "folded")


def test_export_of_an_unfolded_model(tmp_path):
    with pytest.raises(ValueError, match="is not folded; call its merge_and_unload"):
        save_with_code(make_repl(), tmp_path)


def test_a_trainer_of_surrogates_for_a_model_without(tmp_path):
    with pytest.raises(ValueError, match="is no unfolded RepL model"):
        RepLTrainer(make_stock(), SFTConfig(**training_args(tmp_path)))
