"""The configuration of a model from a folder, the built-in table or the hub: its dimensions, never its weights.

The table holds the models of the papers and of the recipes, so that planning works offline. What is not named there
(dropout, norms' epsilons, positions) changes neither memory nor arithmetic.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lopt_hf.common.settings import nearest

__all__ = ["KNOWN_MODELS", "load_config"]


def _dimensions(
    model_type: str,
    hidden_size: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    intermediate_size: int,
    vocab_size: int,
    positions: int,
    **others: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": positions,
        **others,
    }


# Source: each model's config.json on the hub; the tests compare the numbers of parameters with the published ones.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": _dimensions("llama", 576, 30, 9, 3, 1536, 49152, 8192, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-360M": _dimensions("llama", 960, 32, 15, 5, 2560, 49152, 8192, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-1.7B": _dimensions("llama", 2048, 24, 32, 32, 8192, 49152, 8192, tie_word_embeddings=True),
    "Qwen/Qwen2.5-0.5B": _dimensions("qwen2", 896, 24, 14, 2, 4864, 151936, 32768, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B": _dimensions("qwen2", 1536, 28, 12, 2, 8960, 151936, 32768, tie_word_embeddings=True),
    "Qwen/Qwen2.5-3B": _dimensions("qwen2", 2048, 36, 16, 2, 11008, 151936, 32768, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B": _dimensions("qwen2", 3584, 28, 28, 4, 18944, 152064, 32768),
    "Qwen/Qwen2.5-14B": _dimensions("qwen2", 5120, 48, 40, 8, 13824, 152064, 32768),
    "Qwen/Qwen2.5-32B": _dimensions("qwen2", 5120, 64, 40, 8, 27648, 152064, 32768),
    "Qwen/Qwen2.5-72B": _dimensions("qwen2", 8192, 80, 64, 8, 29568, 152064, 32768),
    "Qwen/Qwen3-4B": _dimensions(
        "qwen3", 2560, 36, 32, 8, 9728, 151936, 40960, head_dim=128, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.1-8B": _dimensions("llama", 4096, 32, 32, 8, 14336, 128256, 131072),
    "meta-llama/Llama-3.1-70B": _dimensions("llama", 8192, 80, 64, 8, 28672, 128256, 131072),
    # Its vision tower, CLIP's of 336 pixels, is what `LlavaConfig` has where none is named.
    "llava-hf/llava-1.5-7b-hf": {
        "model_type": "llava",
        "text_config": _dimensions("llama", 4096, 32, 32, 32, 11008, 32064, 4096),
    },
}
_SUFFIX = "-Instruct"  # an instruction-tuned model has its base model's dimensions


def load_config(name_or_path: str) -> PretrainedConfig:
    """Finds the configuration of a causal language model.

    Args:
        name_or_path: A local folder with a `config.json`, a model of the table (with `-Instruct` or without), or
            another hub id.

    Raises:
        ValueError: If there is none that can be reached; the message names the nearest known model.
    """
    known = name_or_path.removesuffix(_SUFFIX)
    if known in KNOWN_MODELS and not Path(name_or_path).is_dir():
        dimensions = dict(KNOWN_MODELS[known])
        return AutoConfig.for_model(dimensions.pop("model_type"), **dimensions)
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        found = nearest(name_or_path, KNOWN_MODELS, cutoff=0.3)
        hint = f" (nearest: {found[0]})" if found else ""
        raise ValueError(
            f"model={name_or_path!r} is no folder with a config.json, no model that a reachable hub or its cache has, "
            f"and not in the built-in table{hint}; pass a folder, or one of {', '.join(KNOWN_MODELS)}."
        ) from error
