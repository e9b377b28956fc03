"""A stage's adapters start as the whole model's do."""

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from lopt_hf.local.blocks import split_layers
from lopt_hf.pipeline.runtime.adapters import adapt_saved_stage, add_adapter
from lopt_hf.pipeline.runtime.stage import load_stage
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from tests.tiny import make_model


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora(**settings):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **settings})


@pytest.mark.parametrize(
    "make_config",
    [
        lambda: lora(),
        lambda: lora(init_lora_weights=False),
        lambda: lora(use_dora=True),
        lambda: lora(target_modules=["q_proj", "c_attn"], modules_to_save=["lm_head", "embed_tokens", "wte"]),
        lambda: lora(target_modules=["q_proj", "c_attn"], bias="all"),
        lambda: LNTuningConfig(target_modules=["input_layernorm", "ln_1"]),
        lambda: lora(target_modules=["q_proj", "c_attn", "lm_head", "embed_tokens", "wte"]),
        lambda: lora(target_modules=["q_proj", "c_attn", "lm_head"], exclude_modules=r".*\.0\..*"),
    ],
    ids=["lora", "drawn", "dora", "modules", "biases", "norms", "ends", "excluded"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_stages_start_as_the_whole_model(tmp_path, family, make_config):
    start = make_model(family, tie_word_embeddings=False)
    for parameter in start.parameters():
        torch.nn.init.normal_(parameter)  # biases too, which are zero otherwise
    start.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    set_seed(7)
    expected = trainable(get_peft_model(whole, make_config()))
    found = {}
    for plan in plan_stages(split_layers(4, 2), 2):
        stage = load_stage(str(tmp_path), plan, dtype=torch.float32)
        found |= trainable(add_adapter(stage, make_config(), 7))
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def test_that_a_stage_lacks_modules_is_not_saved_with_the_adapter(tmp_path):
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    plan = plan_stages(split_layers(4, 2), 2)[1]
    stage = load_stage(str(tmp_path), plan, dtype=torch.float32)
    adapted = add_adapter(stage, lora(target_modules=["q_proj", "embed_tokens"]), 7)
    saved = adapted.peft_config["default"]
    assert saved.exclude_modules is None
    again = adapt_saved_stage(load_stage(str(tmp_path), plan, dtype=torch.float32), saved)
    assert trainable(again).keys() == trainable(adapted).keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' reads the weights of layers"),
        ({"init_lora_weights": False, "use_dora": True}, "init_lora_weights=False with use_dora=True"),
    ],
)
def test_starts_that_a_stage_cannot_know(settings, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(make_model(), lora(**settings), 7)
