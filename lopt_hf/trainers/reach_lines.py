"""What a run with a schedule of reach says before its first step."""

from collections.abc import Iterator
from typing import Any

from lopt_hf.local.learner import LocalLearner

__all__ = ["reach_lines"]


def reach_lines(
    learner: LocalLearner, args: Any, learning_rate: float, max_steps: int, num_processes: int
) -> Iterator[str]:
    """Yields what comes of the schedule in this run, and what to do if the run is too short for it.

    Args:
        learner: The learner, whose schedule it is.
        args: The run's arguments.
        learning_rate: The optimizer's, of the last block.
        max_steps: Its optimizer steps.
        num_processes: How many processes average gradients.
    """
    yield _shares_and_rates(learner, args, learning_rate) + (_averaged(learner) if num_processes > 1 else ".")
    furthest = learner.schedule.furthest(max_steps)
    if furthest < learner.schedule.highest:
        yield (
            f"The run's {max_steps} steps are too few for task_reach={args.task_reach}: the task's gradient reaches "
            f"the last {furthest} of {len(learner.blocks)} blocks at most. Train longer, or put the furthest reach "
            "first."
        )


def _shares_and_rates(learner: LocalLearner, args: Any, learning_rate: float) -> str:
    """How often the task's gradient reaches each block, and at which rate the block learns."""
    rates = [f"{rate:.3g}" for rate in learner.learning_rates(learning_rate)]
    shares = [f"{learner.schedule.share(index):.3g}" for index in range(len(rates))]
    line = (
        f"task_reach={args.task_reach}: of the steps the task's gradient reaches each block at a share of "
        f"{', '.join(shares)} (first to last); learning rates {', '.join(rates)}"
    )
    if args.reach_anneal:
        line += ", each of which ends its schedule with the last step that reaches the block"
    return line


def _averaged(learner: LocalLearner) -> str:
    """How much of the gradients DDP averages."""
    per_block = [
        sum(p.numel() * p.element_size() for p in ps if p.requires_grad) for ps in learner.parameters_to_learn()
    ]
    learns_always = learner.boundary.learns_locally
    averaged = sum(b * (1 if learns_always else learner.schedule.share(i)) for i, b in enumerate(per_block))
    return f"; {averaged / 1e6:.1f} of {sum(per_block) / 1e6:.1f} MB of gradients averaged per step."
