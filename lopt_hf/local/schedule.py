"""The schedule of reach: which blocks the task's gradient reaches at which step, and how often."""

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["RATE_RULES", "ReachSchedule"]

# The factor of the learning rate of a block that is reached once in n steps.
RATE_RULES: dict[str, Callable[[float], float]] = {"none": lambda n: 1.0, "sqrt": math.sqrt, "inverse": lambda n: n}


@dataclass(frozen=True)
class ReachSchedule:
    """A cycle of reaches; a reach is the number of blocks, counted from the last, that the task loss trains.

    Attributes:
        cycle: The reaches.
        num_blocks: Blocks of the model.
        unit: What the cycle runs over: `"step"` optimizer steps, `"microbatch"` the micro-batches of each of them,
            `"run"` the whole run, once: each of its numbers holds for an equal part of the steps.
    """

    cycle: tuple[int, ...] = (1,)
    num_blocks: int = 2
    unit: str = "step"

    @property
    def highest(self) -> int:
        """The furthest reach."""
        return max(self.cycle)

    @property
    def period(self) -> int:
        """Optimizer steps after which a step is as the first."""
        return len(self.cycle) if self.unit == "step" else 1

    def check_run_is_known(self, accumulation_steps: int | None, total_steps: int | None) -> None:
        """Checks that what the schedule runs over is known.

        Raises:
            ValueError: If it is not.
        """
        if self.highest == 1:
            return
        needs = {"run": ("total_steps", total_steps), "microbatch": ("accumulation_steps", accumulation_steps)}
        name, number = needs.get(self.unit, ("", 1))
        if number is None:
            raise ValueError(f"reach_unit={self.unit!r} follows from {name}, which is missing; pass it to `forward`.")

    def at(self, step: int, micro_batch: int = 0, total_steps: int = 1) -> int:
        """Returns the reach at an optimizer step and at a micro-batch in it, both counted from 0.

        Args:
            step: The optimizer step.
            micro_batch: The micro-batch.
            total_steps: Optimizer steps of the run.
        """
        if self.unit == "run":
            return self.cycle[min(step * len(self.cycle) // total_steps, len(self.cycle) - 1)]
        return self.cycle[(step if self.unit == "step" else micro_batch) % len(self.cycle)]

    def end(self, block: int, total_steps: int) -> int:
        """Returns how many of a run's steps pass until the task's gradient has reached a block for the last time.

        Args:
            block: The block's index.
            total_steps: Optimizer steps of the run.
        """
        furthest = self.num_blocks - block
        return max((step + 1 for step in range(total_steps) if self.at(step, 0, total_steps) >= furthest), default=0)

    def furthest(self, total_steps: int) -> int:
        """Returns the furthest reach that a run comes to, which is not the cycle's if the run is too short.

        Args:
            total_steps: Optimizer steps of the run.
        """
        steps = range(min(total_steps, len(self.cycle)) if self.unit == "step" else total_steps)
        return self.highest if self.unit == "microbatch" else max(self.at(step, 0, total_steps) for step in steps)

    def reaches(self, block: int, step: int, micro_batch: int = 0) -> bool:
        """Tells whether the task's gradient reaches a block, by its index."""
        return block >= self.num_blocks - self.at(step, micro_batch)

    def share(self, block: int) -> float:
        """Returns at which share of the optimizer steps the task's gradient reaches a block, by its index."""
        reached = [reach >= self.num_blocks - block for reach in self.cycle]
        return float(any(reached)) if self.unit == "microbatch" else sum(reached) / len(reached)

    def gradient_factors(self, accumulation_steps: int) -> dict[int, float]:
        """Returns what makes the gradients of an accumulated step unbiased, for each block by its index.

        Args:
            accumulation_steps: Micro-batches of the step.

        Returns:
            Micro-batches over those that reach the block; 1 for one that all of them or none reach.
        """
        if self.unit != "microbatch":
            return {}
        factors = {}
        for block in range(self.num_blocks):
            reached = sum(self.reaches(block, 0, index) for index in range(accumulation_steps))
            factors[block] = accumulation_steps / reached if reached else 1.0
        return factors

    def rate_factor(self, block: int, rule: str, limit: float) -> float:
        """Returns what the learning rate of a block is multiplied by.

        Args:
            block: The block's index.
            rule: A name in `RATE_RULES`.
            limit: The most that it may be.
        """
        share = self.share(block)
        return min(RATE_RULES[rule](1 / share), limit) if share else 1.0
