"""What `lopt-hf bench gpu` can be told."""

from dataclasses import dataclass, field
from difflib import get_close_matches

__all__ = ["PARTS", "GpuCheckSettings"]

PARTS = ("steps", "equality", "sharded", "generation", "options")
_SMALLEST = {"limit": 1, "batch_size": 1, "seq_length": 2, "steps": 1}


@dataclass(frozen=True)
class GpuCheckSettings:
    """What a GPU check measures.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    models: tuple[str, ...] = field(
        default=("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B"),
        metadata={"help": "Models whose steps are measured; only their configurations are read, weights are random."},
    )
    parts: tuple[str, ...] = field(default=PARTS, metadata={"help": f"Any of {', '.join(PARTS)}."})
    batch_size: int = field(default=4, metadata={"help": "Sequences per step (paper: 4)."})
    seq_length: int = field(default=1024, metadata={"help": "Tokens per sequence; there is no padding."})
    steps: int = field(default=7, metadata={"help": "Timed steps per row."})
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "Optimizer of the steps; its states have the type of the weights, bfloat16. A 7B model trained "
            "end-to-end needs 71 GiB with it, 57 GiB with adafactor."
        },
    )
    limit: int = field(default=480, metadata={"help": "Seconds for all parts together; what is left is not reached."})
    device: str = field(
        default="auto", metadata={"help": "auto, or cpu: tiny sizes, as a test of the check itself, GPU or not."}
    )

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)} is too small; set it to {smallest} or more.")
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models={self.models} must name at least one model, and each once.")
        for name, allowed, chosen in (("parts", PARTS, self.parts), ("device", ("auto", "cpu"), (self.device,))):
            for value in chosen:
                if value not in allowed:
                    nearest = get_close_matches(value, allowed, n=1, cutoff=0.0)[0]
                    raise ValueError(f"{name}={value!r} is unknown, nearest is {nearest!r}; use {', '.join(allowed)}.")
