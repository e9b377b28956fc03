"""Arguments of learning block by block, whatever the early blocks learn from."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lopt_hf.common.settings import check_left_out, option
from lopt_hf.local.blocks import Block
from lopt_hf.local.methods.base import Method
from lopt_hf.local.run_facts import RunFacts, steps_in_backward
from lopt_hf.local.schedule import ReachSchedule

__all__ = ["LocalArguments"]


@dataclass
class LocalArguments(ABC):
    """Arguments of every method that cuts a decoder into blocks; each method's arguments are a subclass.

    They check nothing when they are made, since a trainer's config, of which they are a part, checks them in order:
    `check` first, then `check_run`.

    Sources: LoPT, arXiv 2605.04913 v3 ("paper"), and its released code, HumyuShi/LoPT commit d4cb99e ("code").

    Parameters:
        num_blocks: Blocks that the decoder layers are cut into. Paper, Sec. 3: 2; more blocks are the code's.
        split_at: First layer of every block but the first, instead of an even split.
        early_learning_rate: Learning rate of early blocks, embeddings and heads. Default: `learning_rate` (paper);
            the code has the option as `lr_k1`.
        clip_scope: What of the gradient is clipped together at `max_grad_norm`: `"block"` each block (paper, App. L),
            `"global"` everything (code), `"part"` each block's layers, and apart from them the embeddings before the
            first block's and the norm and LM head behind the last one's (ours: with `local_step` these are not in
            memory at the same time then).
        tied_embeddings: What to do where the LM head shares the input embedding: `"untie"` gives the head a copy
            (paper and code), `"freeze"` keeps them tied and frozen, so the checkpoint keeps its size and layout.
        train_vision: Of a vision-language model also train the vision tower and its projector, which belong to the
            first block, as the embeddings do. Ours; off, as vision-language recipes leave the tower frozen, so that
            what sees is what it was. Adapters on them are trained or frozen with them.
        log_drift: Log each block's relative weight drift from the start, `||W - W0|| / ||W0||` over its trainable
            parameters. Keeps a copy of them in host memory.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    # What only some methods leave open.
    train_early_blocks: ClassVar[bool] = True
    local_step: ClassVar[bool] = False
    local_update_interval: ClassVar[int] = 1
    window: ClassVar[int] = 1
    reach_rate: ClassVar[str] = "none"
    reach_rate_limit: ClassVar[float] = 1.0
    reach_anneal: ClassVar[bool] = False
    reach_recompute: ClassVar[bool] = False

    # Extended by each method: the lowest value of a number (whole if it is), and what must be one of its `choices`.
    _lowest: ClassVar[dict[str, float]] = {"num_blocks": 2, "early_learning_rate": 0.0}
    _chosen: ClassVar[tuple[str, ...]] = ("clip_scope", "tied_embeddings")

    num_blocks: int = option(2, "Number of blocks the decoder layers are cut into (paper, Sec. 3: 2).")
    split_at: list[int] | None = option(
        None, "Index of the first layer of every block but the first, instead of an even split."
    )
    early_learning_rate: float | None = option(
        None, "Learning rate of early blocks, embeddings and heads. Default: `learning_rate` (paper)."
    )
    clip_scope: str = option(
        "block",
        "Clip the gradient of each block at `max_grad_norm` (paper, App. L), or of all together: 'global' "
        "(released code), or the embeddings and the LM head apart from their blocks' layers: 'part' (ours).",
        ["block", "global", "part"],
    )
    tied_embeddings: str = option(
        "untie",
        "Where the LM head shares the input embedding: 'untie' gives the head a copy (paper and code), "
        "'freeze' keeps both tied and frozen.",
        ["untie", "freeze"],
    )
    train_vision: bool = option(
        False,
        "Of a vision-language model also train the vision tower and projector, with the first block (ours). Default: "
        "frozen, adapters on them included.",
    )
    log_drift: bool = option(
        False, "Log each block's relative weight drift from the start; keeps a copy of the weights."
    )

    @abstractmethod
    def make_method(self) -> Method:
        """Makes the method that these arguments are of."""

    @property
    def freezes_early_blocks(self) -> bool:
        """Whether nothing ever trains the early blocks."""
        return not self.train_early_blocks

    @property
    def schedule(self) -> ReachSchedule:
        """Which blocks the task's gradient reaches at which step; by default the last one always."""
        return ReachSchedule((1,), self.num_blocks)

    def check(self) -> None:
        """Checks the values alone.

        Raises:
            ValueError: If one is out of range; the message names field, value and fix.
        """
        self._check_ranges()
        self._check_choices()
        if self.train_vision and not self.train_early_blocks:
            raise ValueError(
                "train_vision=True does not work with train_early_blocks=False: the vision tower belongs to the first "
                "block; set one of them to the other's value."
            )

    def check_run(self, run: RunFacts) -> None:
        """Checks the values against the run that they are for.

        Raises:
            ValueError: If one does not work in such a run; the message names field, value and fix.
        """
        if run.engine == "DeepSpeed" and self.clip_scope != "global":
            raise ValueError(
                f"clip_scope={self.clip_scope!r} does not work under DeepSpeed, which clips; set it to 'global'."
            )
        self._check_rates(run)
        if run.engine is not None and self.log_drift:
            raise ValueError(
                f"log_drift=True does not work under {run.engine}, which shards the weights; set it to False."
            )

    def _check_rates(self, run: RunFacts) -> None:
        if steps_in_backward(run.optim):
            check_left_out(
                self,
                ("early_learning_rate", "reach_rate", "reach_anneal"),
                f"has no effect with optim={run.optim!r}, which steps in the backward at one rate; leave it out, or "
                "choose another optim.",
            )

    def nothing_trainable(self, block: Block) -> str:
        """The message for an early block of which no parameter is trainable."""
        return (
            f"num_blocks={self.num_blocks}: no parameter of block {block.index} (layers {block.start} to "
            f"{block.stop - 1}) is trainable, as after freezing it or with an adapter on later layers only; make "
            "parameters of the block trainable, or lower num_blocks."
        )

    def _check_ranges(self) -> None:
        for name, bound in self._lowest.items():
            value = getattr(self, name)
            if value is None and name == "early_learning_rate":
                continue
            kind = int if isinstance(bound, int) else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} must be a{'n integer' if kind is int else ' finite number'}.")
            if value < bound:
                raise ValueError(f"{name}={value} is too low; it must be at least {bound}.")
        self._check_split()

    def _check_split(self) -> None:
        if isinstance(self.split_at, int):  # `split_at: 7` in a YAML
            self.split_at = [self.split_at]
        if self.split_at is not None and not all(type(index) is int for index in self.split_at):
            raise ValueError(f"split_at={self.split_at} must be a list of integers.")
        if self.split_at is not None and len(self.split_at) != self.num_blocks - 1:
            raise ValueError(
                f"split_at={self.split_at} makes {len(self.split_at) + 1} blocks but num_blocks={self.num_blocks}; "
                f"set num_blocks to {len(self.split_at) + 1} or give {self.num_blocks - 1} indices."
            )
        if self.split_at is not None and any(
            b <= a for a, b in zip([0, *self.split_at[:-1]], self.split_at, strict=True)
        ):
            raise ValueError(f"split_at={self.split_at} must be strictly increasing layer indices, from 1 on.")

    def _check_choices(self) -> None:
        for name in self._chosen:
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}.")
