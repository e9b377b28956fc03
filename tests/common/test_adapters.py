"""The adapter that a command is asked for is the one that PEFT trains."""

import pytest
from peft import get_peft_model
from trl import ModelConfig

from lopt_hf.common.adapters import adapter_config
from tests.tiny import make_model


@pytest.mark.parametrize(
    ("given", "adapted"),
    [
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([r".*\.[qk]_proj"], {"q_proj", "k_proj"}),
        (["all-linear"], {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}),
    ],
)
def test_one_name_is_as_good_as_two(given, adapted):
    config = adapter_config(ModelConfig(use_peft=True, lora_target_modules=given))
    model = get_peft_model(make_model(), config)
    assert {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_modules() if "lora_A" in name
    } == adapted


def test_none_is_asked_for():
    assert adapter_config(ModelConfig()) is None
