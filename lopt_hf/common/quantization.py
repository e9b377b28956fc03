"""Whether a checkpoint's weights are quantised, and so cannot be trained: one answer for trainers and planner."""

from transformers import PretrainedConfig

__all__ = ["check_trainable", "is_quantized"]


def is_quantized(config: PretrainedConfig) -> bool:
    """Tells whether a model's configuration says that its weights are quantised, as GPTQ's or FP8 checkpoints' do."""
    return config.to_dict().get("quantization_config") is not None


def check_trainable(name: str, quantized: bool, has_adapter: bool) -> None:
    """Checks that something of a model can be trained.

    Args:
        name: The model's.
        quantized: Whether its weights are, or will be once it is loaded.
        has_adapter: Whether an adapter is trained in their place.

    Raises:
        ValueError: If the weights are quantised and there is no adapter.
    """
    if quantized and not has_adapter:
        raise ValueError(
            f"model={name} is quantised, and quantised weights cannot be trained; pass a peft_config such as "
            "`peft.LoraConfig()`, or load the model without quantisation."
        )
