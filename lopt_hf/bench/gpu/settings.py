"""What `lopt-hf bench gpu` can be told."""

from dataclasses import dataclass

from lopt_hf.common.settings import check_choices, check_distinct, check_lowest, option

__all__ = ["PARTS", "GpuCheckSettings"]

PARTS = ("steps", "equality", "sharded", "generation", "options")
DEVICES = ("auto", "cpu")
_SMALLEST = {"limit": 1, "batch_size": 1, "seq_length": 2, "steps": 1}


@dataclass(frozen=True)
class GpuCheckSettings:
    """What a GPU check measures.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    models: tuple[str, ...] = option(
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B"),
        "Models whose steps are measured; only their configurations are read, weights are random.",
    )
    parts: tuple[str, ...] = option(PARTS, f"Any of {', '.join(PARTS)}.")
    batch_size: int = option(4, "Sequences per step (paper: 4).")
    seq_length: int = option(1024, "Tokens per sequence; there is no padding.")
    steps: int = option(7, "Timed steps per row.")
    optim: str = option(
        "adamw_torch_fused",
        "Optimizer of the steps; its states have the type of the weights, bfloat16. A 7B model trained end-to-end "
        "needs 71 GiB with it, 57 GiB with adafactor.",
    )
    limit: int = option(480, "Seconds for all parts together; what is left is not reached.")
    device: str = option("auto", "auto, or cpu: tiny sizes, as a test of the check itself, GPU or not.")

    def __post_init__(self) -> None:
        check_lowest(self, _SMALLEST)
        check_distinct("models", self.models)
        check_distinct("parts", self.parts)
        check_choices(self, {"parts": PARTS, "device": DEVICES})
