"""Tiny models of every supported family, a tokenizer and data, all made here: the tests need no hub."""

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = [
    "<pad>",
    "<eos>",
    "<unk>",
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?#+-*/=\n<>|_",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A:{% generation %}{{ message['content'] }}"
    "<eos>{% endgeneration %}{% else %}U:{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_NO_GROUPS = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}

FAMILIES = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 16},
    "mixtral": {**_COMMON, **_EXPERTS, "num_local_experts": 4},
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 16},
    "qwen3_moe": {**_COMMON, **_EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
    "gemma2": {**_COMMON, "head_dim": 8, "sliding_window": 16},
    "gemma3_text": {**_COMMON, "head_dim": 8, "sliding_window": 16},
    "phi3": {**_COMMON, "pad_token_id": 0},
    "olmo2": _COMMON,
    "smollm3": {**_COMMON, "pad_token_id": 0},
    "granite": _COMMON,
    "gpt2": _GPT2,
    "gpt_neox": {**_NO_GROUPS, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,  # has the projections of OPT-350M before and after the layers
        "dropout": 0.0,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
}


def make_tokenizer(**others: object) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<eos>|<pad>|."), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        **others,
    )


def make_model(family: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A randomly initialised model of 4 layers (unless overridden) in fp32."""
    torch.manual_seed(seed)
    special = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = AutoConfig.for_model(family, **{**special, **FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config)
    # The stock initialisation is so small that a tiny model's logits hardly depend on its layers.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_dataset(num_rows: int = 32) -> Dataset:
    """Sums as prompt and completion, of uneven lengths, so that batches are padded."""
    rows = [(3 * i % 17, 7 * i % 101) for i in range(num_rows)]
    return Dataset.from_dict(
        {
            "prompt": [f"What is {a} + {b}{' ?' * (i % 4)}\n" for i, (a, b) in enumerate(rows)],
            "completion": [f"{a} + {b} = {a + b}." for a, b in rows],
        }
    )


def make_pairs(num_rows: int = 32) -> Dataset:
    """The same sums with a right and a wrong answer."""
    rows = make_dataset(num_rows)
    wrong = [answer[:-2] + str((int(answer[-2]) + 1) % 10) + "." for answer in rows["completion"]]
    return Dataset.from_dict({"prompt": rows["prompt"], "chosen": rows["completion"], "rejected": wrong})


def make_questions(num_rows: int = 32) -> Dataset:
    """The same sums as prompts, with the number that answers them."""
    rows = make_dataset(num_rows)
    answers = [answer.split("= ")[1][:-1] for answer in rows["completion"]]
    return Dataset.from_dict({"prompt": rows["prompt"], "answer": answers})
