"""What cannot be cut into stages is said from the configuration alone, before any process is started."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from lopt_hf.local.blocks import split_layers
from lopt_hf.pipeline.runtime.cut_check import check_cut
from lopt_hf.pipeline.runtime.stage import load_stage
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from tests.tiny import FAMILIES

PLANS = plan_stages(split_layers(4, 2), 2)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GEMMA4 = {**SIZES, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0, "sliding_window": 16}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
GEMMA3N = {
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "sliding_window": 16,
    **PER_LAYER,
}


def lora(*modules, **others):
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(modules), **others)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma4_text"])
def test_what_can_be_cut_is_not_refused(family):
    sizes = {**GEMMA4, "hidden_size_per_layer_input": 0} if family == "gemma4_text" else FAMILIES[family]
    config = AutoConfig.for_model(family, **sizes)
    check_cut(family, config, PLANS, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("family", "sizes", "reason"),
    [
        ("gemma4_text", {**GEMMA4, **PER_LAYER}, "beside the hidden states its layers are given what embed_tokens, "),
        ("gemma3n_text", {**SIZES, "head_dim": 8, **GEMMA3N}, "its layers hand on (4, 1, 2, 32) for two tokens"),
        ("nemotron_h", {**SIZES, "head_dim": 8}, "'PassThrough' object has no attribute 'block_type'"),
        ("falcon_h1", SIZES, "'PassThrough' object has no attribute 'mamba'"),
        ("rwkv", {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 64}, "'PassThrough' object has no attri"),
        (
            "llama4_text",
            {**SIZES, "intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2},
            "are inside 'm",
        ),
        ("roformer", {**SIZES, "is_decoder": True}, "its layers are inside 'encoder'"),
    ],
)
def test_what_cannot_is_one_line(family, sizes, reason):
    with pytest.raises(ValueError) as refused:
        check_cut(family, AutoConfig.for_model(family, **sizes), PLANS, None)
    message = str(refused.value)
    assert " cannot be cut into stages" in message and reason in message and "\n" not in message
    assert message.endswith("; train it in one process with `lopt-hf sft`.")


def test_a_stage_of_embeddings_for_each_layer_is_not_loaded(tmp_path):
    """Its part of them would be zeros, and it would train on."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **GEMMA4, **PER_LAYER))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embed_tokens_per_layer"):
        load_stage(str(tmp_path), PLANS[1], dtype=torch.float32)


def test_layers_that_return_a_list_can_be_cut():
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    check_cut("gpt", AutoConfig.for_model("openai-gpt", **sizes), PLANS, None)


def test_an_adapter_must_leave_every_stage_something_to_train():
    config = AutoConfig.for_model("llama", **SIZES)
    check_cut("llama", config, PLANS, lora("q_proj", "embed_tokens"))
    with pytest.raises(ValueError, match="target_modules names the LM head, whose weight TRL's loss reads past"):
        check_cut("llama", config, PLANS, lora("q_proj", "lm_head"))
    with pytest.raises(
        ValueError, match=r"target_modules=\['embed_tokens'\] adapts nothing on the stage of layers 2 to"
    ):
        check_cut("llama", config, PLANS, lora("embed_tokens"))
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\] adapts nothing on the stage of layers 2 to 3"):
        check_cut("llama", config, PLANS, lora("q_proj", layers_to_transform=[0]))
