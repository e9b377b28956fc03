"""What the runs of a part train, and for how long."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TrainingWorkload"]


@dataclass(frozen=True)
class TrainingWorkload:
    """What every run of a part trains, and for how long.

    Attributes:
        config: The model's configuration, `model_type` included.
        batch_size: Sequences of a step.
        seq_length: Tokens of a sequence; there is no padding.
        warmup: Steps before anything is measured.
        steps: Timed steps, or cycles of them where steps differ.
        optim: Name in `TrainingArguments.optim`.
        learning_rate: Constant.
        device: `"cuda"` or `"cpu"`.
        is_made_on_cpu: Make the weights on the CPU, so that they are the same on every device.
        deterministic: Ask torch for the same bits every time, where a kernel can.
        seed: Of weights, heads and tokens.
    """

    config: Mapping[str, Any]
    batch_size: int
    seq_length: int
    warmup: int
    steps: int
    optim: str
    learning_rate: float
    device: str
    is_made_on_cpu: bool = False
    deterministic: bool = False
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.seq_length
