"""Which blocks each stage of a pipeline runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from lopt_hf.local.blocks import Block

__all__ = ["StagePlan", "plan_stages"]


@dataclass(frozen=True)
class StagePlan:
    """Which blocks a stage runs.

    Attributes:
        index: Position in the pipeline, from 0.
        num_stages: Number of stages.
        blocks: The stage's blocks, one or several neighbours.
        num_layers: Number of decoder layers of the whole model.
    """

    index: int
    num_stages: int
    blocks: tuple[Block, ...]
    num_layers: int

    @property
    def is_first(self) -> bool:
        """Whether the stage has the embeddings."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage has the final norm, the LM head and the task loss."""
        return self.index == self.num_stages - 1

    @property
    def start(self) -> int:
        """Index of its first decoder layer."""
        return self.blocks[0].start

    @property
    def stop(self) -> int:
        """Index of the layer after its last."""
        return self.blocks[-1].stop

    @property
    def delay(self) -> int:
        """Optimizer steps by which the task's gradient is late on it, where stages send gradients back."""
        return self.num_stages - 1 - self.index

    @property
    def name(self) -> str:
        """Name of the stage's folder in a checkpoint."""
        return f"stage-{self.index}"

    def __str__(self) -> str:
        return self.describe("LM head")

    def describe(self, head: str) -> str:
        """Returns what the stage has, in words; `head` says what is behind the layers."""
        indices = ", ".join(str(block.index) for block in self.blocks)
        ends = " with the embeddings" * self.is_first + f" with the {head}" * self.is_last
        return f"stage {self.index}: block {indices}, layers {self.start} to {self.stop - 1}{ends}"


def plan_stages(blocks: Sequence[Block], num_stages: int) -> list[StagePlan]:
    """Gives each stage its blocks: neighbours, and as many layers as evenly as whole blocks allow.

    Args:
        blocks: The cut of the decoder.
        num_stages: Number of stages, at most one per block.

    Raises:
        ValueError: If there are more stages than blocks, or fewer than two.
    """
    if not 2 <= num_stages <= len(blocks):
        raise ValueError(
            f"num_stages={num_stages} does not fit num_blocks={len(blocks)}: a stage runs one block or several; "
            f"choose from 2 to {len(blocks)} stages, or raise num_blocks."
        )
    num_layers = blocks[-1].stop
    plans: list[StagePlan] = []
    first = 0
    for index in range(num_stages):
        left = num_stages - index - 1  # stages that still need a block each
        target = num_layers * (index + 1) / num_stages
        ends = range(first + 1, len(blocks) - left + 1)
        last = len(blocks) if left == 0 else min(ends, key=lambda end: abs(blocks[end - 1].stop - target))
        plans.append(StagePlan(index, num_stages, tuple(blocks[first:last]), num_layers))
        first = last
    return plans
