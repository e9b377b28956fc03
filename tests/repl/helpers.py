"""Tiny RepL models."""

from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from lopt_hf import RepLConfig, get_repl_model
from tests.tiny import make_model

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "smollm3")
INPUT_IDS = torch.arange(3, 27).reshape(2, 12)
REMOVED = [1, 4]


def make_stock(family: str = "llama", **overrides: Any) -> Any:
    """A stock model of 6 layers with biases and norm weights that are not the trivial ones."""
    model = make_model(family, **{"num_hidden_layers": 6, **overrides}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + ("norm" in name or "ln_" in name))
    return model


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 80, (4, 16), generator=generator)} for _ in range(count)]


def make_repl(model: Any = None, **settings: Any) -> Any:
    model = make_stock() if model is None else model
    config = RepLConfig(**{"layers_to_replace": REMOVED, **settings})
    return get_repl_model(model, config, batches() if config.needs_calibration_data else None)


def make_vit() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    model = ViTForImageClassification(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**(inputs or {"input_ids": INPUT_IDS})).logits
