"""Tiny models of transformers' decoder families: the sizes that many configs name alike, and what differs."""

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import VOCABULARY

__all__ = ["FAMILIES", "SHARED_KEYS", "make_family"]

_DROPOUTS = (
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "layerdrop"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "router_jitter_noise"),
)
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), len(VOCABULARY)),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff", "ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "sliding_window": 16,
    **dict.fromkeys(_DROPOUTS, 0.0),
    "is_decoder": True,
}
_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}

# What differs from `_SIZES`, by `model_type`.
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "afmoe apertus apertus1p5_text arcee aria_text beam bert bert-generation big_bird biogpt".split(), {}
    ),
    **dict.fromkeys("bitnet bloom camembert cohere cohere2 cohere2_moe ctrl cwm data2vec-text".split(), {}),
    **dict.fromkeys("deepseek_v4 diffllama doge dots1 ernie ernie4_5 ernie4_5_moe exaone4".split(), {}),
    **dict.fromkeys("exaone_moe falcon_mamba flex_olmo flint gemma gemma4_unified_text glm glm4 glm4_moe".split(), {}),
    **dict.fromkeys("gpt_bigcode gpt_neox_japanese gpt_oss granite_swa granitemoe granitemoe_swa".split(), {}),
    **dict.fromkeys("granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax".split(), {}),
    **dict.fromkeys("inkling_text jais2 jetmoe kolibri1 laguna lara_mini lfm2 lfm3 mamba".split(), {}),
    **dict.fromkeys("megatron-bert mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text ministral".split(), {}),
    **dict.fromkeys("ministral3 modernbert-decoder moshi mpt nanochat nemotron nemotron_h olmo olmo3".split(), {}),
    **dict.fromkeys("olmo_hybrid olmoe openai-gpt persimmon phi phimoe qwen2_moe qwen3_5_moe_text".split(), {}),
    **dict.fromkeys("qwen3_5_text qwen3_next recurrent_gemma roberta roberta-prelayernorm".split(), {}),
    **dict.fromkeys("roformer rwkv seed_oss solar_open stablelm starcoder2 vaultgemma xglm".split(), {}),
    **dict.fromkeys("xlm-roberta xlm-roberta-xl".split(), {}),
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu".split(), _LATENT
    ),
    "electra": {"embedding_size": 32},  # TRL's LM head leaves out what is between the layers and the head
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "xmod": {"default_language": "en_XX"},
    "longcat_flash": {**_LATENT, "moe_topk": 2, "num_layers": 4, "zero_expert_num": 1, "expert_ffn_hidden_size": 24},
    "bamba": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
}
# Decoders whose last two layers attend to the keys and values of the first two
_SHARING = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": len(VOCABULARY),
}
SHARED_KEYS: dict[str, dict[str, Any]] = {
    "gemma4_text": {**_SHARING, "global_head_dim": 8},
    "gemma3n_text": {**_SHARING, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
}


def make_config(family: str) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[family]
    known = {*getattr(config_class, "__dataclass_fields__", {}), *inspect.signature(config_class.__init__).parameters}
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    return config_class(**{**sizes, **(FAMILIES | SHARED_KEYS)[family]})


def make_family(family: str) -> PreTrainedModel:
    """A model of 4 layers in fp32 whose logits depend on its layers, as the stock initialisation's hardly do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family), dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.1)
    return model
