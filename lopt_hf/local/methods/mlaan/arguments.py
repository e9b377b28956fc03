"""What a user can choose of MLAAN."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lopt_hf.common.settings import check_left_out, option
from lopt_hf.common.yaml_files import read_yaml
from lopt_hf.local.reach import ReachArguments, read_cycle
from lopt_hf.local.run_facts import NEXT_TOKEN_MISFITS, RunFacts
from lopt_hf.local.schedule import ReachSchedule
from lopt_hf.local.windows import LossWeights

__all__ = ["MLAANSettings"]

# What is of the losses of early blocks alone
_OF_AUXILIARIES = (
    *("leap_layers", "leap_share", "leap", "combine", "ema_decay", "ema_layers", "translator"),
    *("independent_weight", "cascaded_weight", "readout", "auxiliary_warmup_steps", "auxiliary_checkpointing"),
)


@dataclass
class MLAANSettings(ReachArguments):
    """Fields of `MLAANArguments`, and their checks; those of `ReachArguments` are among them.

    Sources: MLAAN, arXiv 2406.16633 ("paper"), and its released code, Wendy231015/MLAAN ("code"). Both train
    convolutional networks from scratch; "ours" is what language models that are trained already need.

    Parameters:
        num_blocks: Blocks that the decoder layers are cut into. Ours: 4; the papers' ImageNet networks have few too.
        window: Number of adjacent blocks that a loss reaches, k. Code: 2. 1: no gradient crosses a boundary.
            `num_blocks`: one window, the task loss alone, which is end-to-end training. `task_reach` lets the task
            loss reach more blocks at some steps, whose graphs are kept until then.
        leap_layers: For each early block how many deeper layers its auxiliary has, or which: `[3, 2, 1]`, or
            `[[21, 25, 29], [27, 29], [29]]`. 0: none, the loss stands on the block's output. Default: `leap_share` of
            the layers that follow, so that the number falls with depth (paper: 4, ..., 4, 3, 3, 2, 1).
        leap_share: Share of the layers that follow a block in its auxiliary, where `leap_layers` is not given. Ours:
            half; with fewer the local losses of a pretrained model start far above its own (recipes/smollm2-135m).
        leap: Which deeper layers: `"even"` spreads them over the layers that follow (paper), `"last"` takes the last
            ones, `"calibrate"` adds one after the other the layer that lowers the local loss most on a few batches.
            The last layer is always among them.
        combine: The first leapt layer's output is the `"mean"` of copy and moving average, so that the auxiliary
            starts as the pretrained model with layers left out (ours), or their `"sum"` (code).
        ema_decay: Decay m of the moving averages, after every optimizer step (paper and code: 0.995).
        ema_layers: Leapt layers with a moving average beside them: the `"first"` (code), or `"all"`.
        translator: `"calibrated"` puts a linear map before each gap of layers, fitted in closed form before training
            (ours: without it the local loss of a pretrained model is worse than guessing), `"none"` nothing (paper).
        calibration_tokens: Tokens of the training set that the translators are fitted to. Ours: 8192, 14 for each
            channel of SmolLM2-135M.
        independent_weight: Weight of the loss on a block's own output (code: 0.001).
        cascaded_weight: Weight of the loss behind the auxiliary, which reaches the window (code: 0.999).
        readout: Norm and LM head of the local losses: the model's `"frozen"` as at the start (ours: they are large),
            an `"ema"` of them, or a `"trainable"` copy for each block (code).
        auxiliary_warmup_steps: For so many first steps the local losses train the auxiliaries only. Ours: 0.
        auxiliary_checkpointing: Compute an auxiliary's layers again in its backward, which follows at once, so that it
            adds the activations of one layer to those of the window. Ours.

    Raises:
        ValueError: If a value is out of range, or under an engine that must see one backward per step.
    """

    _lowest: ClassVar[dict[str, float]] = ReachArguments._lowest | {
        "window": 1,
        "leap_share": 0.0,
        "ema_decay": 0.0,
        "calibration_tokens": 1,
        "independent_weight": 0.0,
        "cascaded_weight": 0.0,
        "auxiliary_warmup_steps": 0,
    }
    _chosen: ClassVar[tuple[str, ...]] = (
        "leap",
        "combine",
        "ema_layers",
        "translator",
        "readout",
        *ReachArguments._chosen,
    )
    num_blocks: int = option(4, "Number of blocks the decoder layers are cut into (ours: 4).")
    window: int = option(  # type: ignore[misc]  # of the class where it is not a choice
        2, "Number of adjacent blocks that a loss reaches (code: 2); num_blocks is end-to-end."
    )
    leap_layers: list[Any] | str | None = option(  # text where it comes from a command line
        None,
        "For each early block how many deeper layers its auxiliary has, as [3, 2, 1], or which, as "
        "[[21, 25, 29], [27, 29], [29]]. Default: leap_share of the layers that follow.",
    )
    leap_share: float = option(
        0.5, "Share of the following layers in an auxiliary, where leap_layers is not given (ours: 0.5)."
    )
    leap: str = option(
        "even",
        "Which deeper layers: 'even' over those that follow (paper), the 'last' ones, or 'calibrate': "
        "those that lower the local loss most at the start.",
        ["even", "last", "calibrate"],
    )
    combine: str = option(
        "mean", "Copy and moving average as their 'mean' (ours) or their 'sum' (code).", ["mean", "sum"]
    )
    ema_decay: float = option(0.995, "Decay of the moving averages, per optimizer step (paper: 0.995).")
    ema_layers: str = option(
        "first", "Leapt layers with a moving average beside them: 'first' (code) or 'all'.", ["first", "all"]
    )
    translator: str = option(
        "calibrated",
        "'calibrated': a linear map before each gap of layers, fitted before training (ours); 'none' (paper).",
        ["calibrated", "none"],
    )
    calibration_tokens: int = option(
        8192, "Training tokens that translators are fitted to and leaps chosen by (ours)."
    )
    independent_weight: float = option(0.001, "Weight of the loss on a block's own output (code: 0.001).")
    cascaded_weight: float = option(0.999, "Weight of the loss behind the auxiliary (code: 0.999).")
    readout: str = option(
        "frozen",
        "Norm and LM head of the local losses: 'frozen' as at the start (ours), their 'ema', or a "
        "'trainable' copy for each block (code).",
        ["frozen", "ema", "trainable"],
    )
    auxiliary_warmup_steps: int = option(
        0, "First steps in which the local losses train the auxiliaries only (ours: 0)."
    )

    auxiliary_checkpointing: bool = option(
        True, "Compute an auxiliary's layers again in its backward, for the activations of one (ours)."
    )

    @property
    def schedule(self) -> ReachSchedule:
        """As the parent's; where the task's gradient reaches more than its window at some steps, it does at all."""
        given = super().schedule
        if given.highest <= self.window:
            return ReachSchedule((1,), self.num_blocks)
        return replace(given, cycle=tuple(max(reach, self.window) for reach in given.cycle))

    @property
    def loss_weights(self) -> LossWeights:
        """The weights of the two losses on an early block."""
        return LossWeights(self.independent_weight, self.cascaded_weight)

    @property
    def task_share(self) -> float:
        """The share of the task's gradient that leaves the last block: all of it where it is the only loss."""
        if self.window == self.num_blocks:
            return 1.0
        return self.cascaded_weight / (self.independent_weight + self.cascaded_weight)

    def check_run(self, run: RunFacts) -> None:
        if run.task in NEXT_TOKEN_MISFITS:
            raise ValueError(
                f"method='mlaan' does not fit {run.task}: {NEXT_TOKEN_MISFITS[run.task]}; set it to 'lopt'."
            )
        if run.engine == "FSDP2":
            raise ValueError(
                "MLAAN does not work under FSDP2, which shards the layers whose weights its auxiliaries average; "
                "train in one process or with DDP (--accelerate_config ddp_2), or set method to "
                "'lopt'."
            )
        if run.wants_one_backward is not None:
            raise ValueError(
                f"MLAAN does not work under {run.wants_one_backward}, which must see one backward per step; train in "
                "one process or with DDP (--accelerate_config ddp_2), with another optimizer."
            )
        if max(self.window, self.schedule.highest) > 1 and run.reentrant_checkpointing:
            name = "window" if self.window > 1 else "task_reach"
            raise ValueError(
                f"{name}={getattr(self, name)} does not work with reentrant activation checkpointing, which gives "
                "a block's input no gradient by itself; leave use_reentrant out, or set it to False."
            )
        self._check_windows(run)
        super().check_run(run)

    def _check_windows(self, run: RunFacts) -> None:
        """Refuses what cannot go along with a block's graph that several losses have a backward through."""
        if self.window == self.num_blocks:  # the task loss is alone
            return
        if (self.window > 1 or self.schedule.highest > 2) and run.needs_one_traversal is not None:
            name = "window" if self.window > 1 else "task_reach"
            raise ValueError(
                f"{name}={getattr(self, name)} does not work with {run.needs_one_traversal}, while a block in several "
                f"losses' windows has a backward of each; leave it out, or lower {name}."
            )
        if run.is_compiled:
            raise ValueError(
                "MLAAN does not work with torch.compile, which cannot follow how its auxiliaries run the model's "
                "layers; set torch_compile to False (and start without --dynamo_backend), or set method to 'lopt'."
            )

    def check(self) -> None:
        super().check()
        highest = max(read_cycle(self.task_reach))
        if 1 < highest <= self.window:
            raise ValueError(
                f"task_reach={self.task_reach} does nothing with window={self.window}, which the task loss reaches at "
                "every step; raise one of its numbers, or lower window."
            )
        self._check_auxiliaries()

    def _check_auxiliaries(self) -> None:
        """Refuses options of the auxiliaries that come to nothing."""
        if self.window == self.num_blocks:
            check_left_out(
                self,
                _OF_AUXILIARIES,
                f"does nothing with window={self.window}, all of num_blocks={self.num_blocks}, where the task loss is "
                "alone; leave it out, or lower window.",
            )
        if self.leap_layers is not None:
            given = f"does nothing with leap_layers={self.leap_layers}, which says it already; leave one of them out."
            are_named = all(isinstance(entry, list) or entry == 0 for entry in self.leap_layers)
            check_left_out(self, ["leap_share", "leap"] if are_named else ["leap_share"], given)

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.window > self.num_blocks:
            raise ValueError(
                f"window={self.window} is more than num_blocks={self.num_blocks}; at num_blocks it is end-to-end."
            )
        for name in ("ema_decay", "leap_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)} is too high; it must be at most 1.")
        if self.independent_weight + self.cascaded_weight == 0:
            raise ValueError("independent_weight and cascaded_weight are both 0; set cascaded_weight to 0.999.")
        self.leap_layers = _read_leaps(self.leap_layers)
        if self.leap_layers is not None and len(self.leap_layers) != self.num_blocks - 1:
            raise ValueError(
                f"leap_layers={self.leap_layers} has {len(self.leap_layers)} entries, but there are "
                f"{self.num_blocks - 1} early blocks with num_blocks={self.num_blocks}; give one for each."
            )


def _read_leaps(value: Any) -> list[Any] | None:
    """`leap_layers` as a list of numbers or of lists of indices, from Python, YAML or a command line."""
    if value is None:
        return None
    message = (
        f"leap_layers={value!r} must be a list with a number of layers, or a list of layer indices, for each early "
        "block, such as [3, 2, 1] or [[21, 25, 29], [27, 29], [29]]."
    )
    if isinstance(value, str):
        try:
            value = read_yaml(value, "leap_layers")
        except ValueError as error:
            raise ValueError(message) from error
    entries = (
        [list(entry) if isinstance(entry, tuple | list) else entry for entry in value]
        if isinstance(value, tuple | list)
        else None
    )
    if entries is None or not all(_is_leap(entry) for entry in entries):
        raise ValueError(message)
    return entries


def _is_leap(entry: Any) -> bool:
    if isinstance(entry, list):
        return all(isinstance(index, int) for index in entry)
    return isinstance(entry, int) and entry >= 0
