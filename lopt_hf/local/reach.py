"""How far the task's gradient reaches at a step: one dial from freezing to end-to-end training."""

import ast
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lopt_hf.common.settings import check_left_out, option
from lopt_hf.local.arguments import LocalArguments
from lopt_hf.local.run_facts import RunFacts
from lopt_hf.local.schedule import RATE_RULES, ReachSchedule

__all__ = ["ReachArguments", "ReachText", "read_cycle"]


def read_cycle(value: Any) -> list[int]:
    """Reads a cycle of reaches.

    Args:
        value: An integer, a sequence of integers, or the text of one: `"4"`, `"[1, 1, 1, 4]"`, `"1,1,1,4"`.

    Raises:
        ValueError: If it is nothing of that.
    """
    cycle = value
    if isinstance(value, str):
        try:
            cycle = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            cycle = None
    if isinstance(cycle, int):
        cycle = [cycle]
    if not isinstance(cycle, Sequence) or not all(type(reach) is int for reach in cycle):
        raise ValueError(
            f"task_reach={value!r} is not a number of blocks; give an integer such as 2, or a cycle such as [1,1,1,4]."
        )
    return list(cycle)


class ReachText(tuple[int, ...]):
    """A cycle of reaches, read from the text of an option of a command."""

    __slots__ = ()

    def __new__(cls, text: str) -> "ReachText":
        try:
            return super().__new__(cls, read_cycle(text))
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error


@dataclass
class ReachArguments(LocalArguments):
    """Arguments of a method whose task gradient may reach more than the last block; all of them are ours.

    Parameters:
        task_reach: The number of blocks, counted from the last, that the task loss trains at an optimizer step: an
            integer, or a list that is a cycle over the steps. 1 is local learning (or, with `local_objective="none"`,
            freezing the early blocks), `num_blocks` end-to-end training, `[1, 1, 1, 4]` the one at three steps and
            the other at the fourth.
        reach_unit: What the cycle runs over: `"step"` optimizer steps; `"run"` the whole run, once, so that
            `[4, 1, 1, 1]` trains all of four blocks in the first quarter of the steps and the last one then; or
            `"microbatch"` the micro-batches of each step (`gradient_accumulation_steps`), of which then every one
            trains all blocks, and the gradient that a block gets from some of them is scaled to be unbiased.
        reach_rate: How the learning rate of a block follows from how often it is reached, once in n steps:
            `"none"` not at all, `"sqrt"` times the root of n, `"inverse"` times n. `early_learning_rate` wins over it.
        reach_rate_limit: The most that a rate is multiplied by.
        reach_anneal: With `reach_unit="run"`, whether a block's learning rate runs through the whole of
            `lr_scheduler_type`, warmup and all, by the last step that reaches it (as in FreezeOut, arXiv 1706.04983);
            otherwise the block is left where a high rate brought it. It helps at high rates, and costs at low ones.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    _lowest: ClassVar[dict[str, float]] = LocalArguments._lowest | {"reach_rate_limit": 1.0}
    _chosen: ClassVar[tuple[str, ...]] = (*LocalArguments._chosen, "reach_unit", "reach_rate")

    # A parser of commands reads the option's text by the first type that is named here.
    task_reach: ReachText | str | int | list[int] = option(
        1,
        "Blocks, counted from the last, that the task loss trains: a number, or a cycle over the "
        "optimizer steps such as '[1,1,1,4]'. 1: local learning; num_blocks: end-to-end training (ours).",
    )
    reach_unit: str = option(
        "step",
        "What the cycle of `task_reach` runs over: optimizer steps ('step'), the whole run, once ('run': the first "
        "number for the first part of the steps, and so on), or the micro-batches of each step ('microbatch', scaled "
        "to be unbiased).",
        ["step", "run", "microbatch"],
    )
    reach_rate: str = option(  # type: ignore[misc]  # of the class where it is not a choice
        "none",
        "Multiply the learning rate of a block that is reached once in n steps by the root of n ('sqrt'), "
        "by n ('inverse'), or not at all ('none').",
        RATE_RULES,
    )
    reach_rate_limit: float = option(  # type: ignore[misc]  # of the class where it is not a choice
        4.0, "The most that `reach_rate` multiplies a learning rate by."
    )
    reach_anneal: bool = option(  # type: ignore[misc]  # of the class where it is not a choice
        False,
        "With `reach_unit='run'`: run a block's learning rate through the whole of its schedule by the last step that "
        "reaches it.",
    )

    @property
    def learns_after_reach(self) -> bool:
        """Whether a block has something to learn from when the task's gradient reaches it no more."""
        return True

    @property
    def schedule(self) -> ReachSchedule:
        return ReachSchedule(tuple(read_cycle(self.task_reach)), self.num_blocks, self.reach_unit)

    def check(self) -> None:
        self.task_reach = read_cycle(self.task_reach)
        super().check()
        self._check_cycle()

    def _check_cycle(self) -> None:
        cycle = read_cycle(self.task_reach)
        if not cycle:
            raise ValueError("task_reach=[] is an empty cycle; give at least one number of blocks, such as 1.")
        wrong = [reach for reach in cycle if not 1 <= reach <= self.num_blocks]
        if wrong:
            raise ValueError(
                f"task_reach={cycle}: {wrong[0]} is not a number of blocks from 1 to num_blocks={self.num_blocks}; "
                "correct it, or change num_blocks."
            )
        if max(cycle) > 1 and not self.train_early_blocks:
            raise ValueError(
                f"task_reach={cycle} trains early blocks, which train_early_blocks=False freezes; set task_reach to "
                "1, or train_early_blocks to True."
            )
        if len(set(cycle)) == 1:
            check_left_out(
                self,
                ["reach_unit", "reach_rate"],
                f"does nothing with task_reach={cycle}, which is the same at every step; leave it out, or give a "
                "cycle of several numbers.",
            )
        if self.reach_rate == "none":
            check_left_out(
                self, ["reach_rate_limit"], "does nothing with reach_rate='none'; leave it out, or set reach_rate."
            )
        if self.reach_anneal and self.reach_unit != "run":
            raise ValueError(
                f"reach_anneal=True does nothing with reach_unit={self.reach_unit!r}, which reaches every block until "
                "the end; set it to False, or reach_unit to 'run'."
            )
        if self.reach_anneal and self.learns_after_reach:
            raise ValueError(
                "reach_anneal=True would end the blocks' local objective with the task's reach, and it goes on after; "
                "set it to False, or local_objective to 'none'."
            )
        if self.reach_unit != "step" and self.reach_rate != "none":
            raise ValueError(
                f"reach_rate={self.reach_rate!r} does not go with reach_unit={self.reach_unit!r}, where no block "
                "waits between its steps; set it to 'none'."
            )

    def check_run(self, run: RunFacts) -> None:
        super().check_run(run)
        if self.schedule.highest == 1:
            return
        if run.engine not in (None, "FSDP2"):
            raise ValueError(
                f"task_reach={self.task_reach} does not work under {run.engine}, whose sharded blocks cannot run "
                "outside of the model's forward, or miss a step; set it to 1, or use FSDP2 with "
                "TRANSFORMER_BASED_WRAP, DDP or one process."
            )
        if self.reach_recompute and run.wants_one_backward is not None:
            raise ValueError(
                f"reach_recompute=True does not work with {run.wants_one_backward}, which must see one backward per "
                "step; set it to False, or choose another optimizer."
            )
        if self.reach_recompute and run.is_compiled:
            raise ValueError(
                "reach_recompute=True does not work with torch_compile=True (or --dynamo_backend), which cannot "
                "follow how a block runs again; set one of them to False."
            )
        if self.reach_unit == "microbatch":
            self._check_micro_batches(run.accumulation_steps)

    def _check_micro_batches(self, accumulation_steps: int) -> None:
        cycle, highest = self.schedule.cycle, self.schedule.highest
        if highest not in cycle[:accumulation_steps]:
            raise ValueError(
                f"reach_unit='microbatch': with gradient_accumulation_steps={accumulation_steps} no micro-batch comes "
                f"to the reach of {highest} in task_reach={list(cycle)}; set gradient_accumulation_steps to at least "
                f"{cycle.index(highest) + 1}."
            )
