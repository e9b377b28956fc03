"""LoPT: no gradient crosses a boundary, and every early block learns from a local objective on its own output."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from lopt_hf.common.settings import check_left_out, option
from lopt_hf.local.blocks import Block
from lopt_hf.local.boundary import GradientBoundary
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.methods.base import Learner, Method
from lopt_hf.local.objectives import LocalObjective, NoObjective, ReconstructionObjective
from lopt_hf.local.reach import ReachArguments
from lopt_hf.local.readout import ReadoutObjective
from lopt_hf.local.run_facts import NEXT_TOKEN_MISFITS, RunFacts, steps_in_backward

logger = logging.getLogger(__name__)

__all__ = ["LOPT_PAPER", "LoPT", "LoPTArguments"]

LOPT_PAPER = {
    "title": "Rethinking Local Learning: A Cheaper and Faster Recipe for LLM Post-Training",
    "id": "2605.04913",
    # docstyle-ignore
    "citation": """\
@article{shi2026lopt,
    title  = {{Rethinking Local Learning: A Cheaper and Faster Recipe for LLM Post-Training}},
    author = {Shi, Hengyu and Han, Tianyang and Wang, Peizhe and Wang, Zhiling and others},
    year   = 2026,
    eprint = {arXiv:2605.04913},
}""",
}

_RECONSTRUCTION = ("reconstruction_weight", "reconstruction_bottleneck", "reconstruction_mask")


@dataclass
class LoPTArguments(ReachArguments):
    """Arguments of LoPT; those of `ReachArguments` are among them.

    Sources: LoPT, arXiv 2605.04913 v3 ("paper"), and its released code, HumyuShi/LoPT commit d4cb99e ("code").

    Parameters:
        local_objective: What the early blocks learn from. `"reconstruction"`: to keep their input recoverable (paper,
            Sec. 3). `"readout"`: the next token, read through the model's final norm and LM head as they were at the
            start, at weight 1 for every block (ZeroLock's form, arXiv 2608.07974); the `reconstruction_*` arguments
            do not apply; for supervised fine-tuning only. `"none"`: from the task loss alone, at the steps at which
            it reaches them (`task_reach`); ours. An objective that is passed to the trainer takes the place of these.
        reconstruction_weight: lambda, the weight of the mean local loss over the early blocks. Paper, Sec. 3: 10.
        reconstruction_bottleneck: Divisor of the reconstruction head's inner width. Paper, Sec. 3: 4.
        reconstruction_mask: Which positions count in the local loss: `"attention"` leaves padding out (paper, App. L),
            `"none"` counts it too (code).
        local_backward: `"eager"` runs each block's local backward in the forward, as soon as the block is done
            (paper, App. L), which frees its activations; `"joint"` adds the local losses to the task loss (code).
            `"auto"` picks eager where it works: one process, DDP or FSDP2.
        local_update_interval: Let the early blocks learn from their objective at every n-th optimizer step only; at
            the others those that the task's gradient does not reach run without gradients, which saves the arithmetic
            too. Ours; paper and code update at every step.
        local_step: Let an early block take its optimizer step right after its local backward, and free its gradients
            before the next block runs (paper, App. L): the gradients of one block are in memory at a time, not those
            of all; with `clip_scope="part"` less still. The weights end the same, bit for bit, unless a block reads
            another's weights (RepL's operators that do, next to a boundary). No use with `gradient_accumulation_steps`
            above 1: gradients that accumulate have to stay. Under DDP the step waits for the average of the block's
            gradients, which otherwise overlaps the next blocks. Callbacks (`on_pre_optimizer_step`) come when the last
            block is about to step, and the early ones have; step hooks of the optimizer run once for each block. Off,
            as in the released code.
        train_early_blocks: `False` freezes early blocks and embeddings (paper's control experiment).
        reach_recompute: Run a reached early block without a graph, and again with one when its turn in the backward
            has come: the activations of one block are the most that ever lives, for one more forward of the early
            blocks that are reached. `False` keeps their graphs.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    _lowest: ClassVar[dict[str, float]] = ReachArguments._lowest | {
        "reconstruction_weight": 0.0,
        "reconstruction_bottleneck": 1,
        "local_update_interval": 1,
    }
    _default_objective: ClassVar[str] = "reconstruction"
    _chosen: ClassVar[tuple[str, ...]] = (
        "local_objective",
        "reconstruction_mask",
        "local_backward",
        *ReachArguments._chosen,
    )

    local_objective: str = option(
        "reconstruction",
        "What the early blocks learn from: 'reconstruction' of their input (paper, Sec. 3), or 'readout', "
        "the next token through the model's own norm and head, frozen as at the start (ZeroLock), or 'none': the "
        "task loss alone, where `task_reach` lets it reach them (ours).",
        ["reconstruction", "readout", "none"],
    )
    reconstruction_weight: float = option(10.0, "Weight (lambda) of the mean local loss (paper, Sec. 3: 10).")
    reconstruction_bottleneck: int = option(4, "Divisor of the reconstruction head's inner width (paper, Sec. 3: 4).")
    reconstruction_mask: str = option(
        "attention",
        "Positions that count in the local loss: 'attention' leaves padding out (paper, App. L), 'none' "
        "counts it too (released code).",
        ["attention", "none"],
    )
    local_backward: str = option(
        "auto",
        "'eager' runs a block's local backward as soon as the block is done and frees its activations "
        "(paper, App. L), 'joint' adds the local losses to the task loss (released code), 'auto' is eager where "
        "it works: one process, DDP or FSDP2.",
        ["auto", "eager", "joint"],
    )
    local_update_interval: int = option(  # type: ignore[misc]  # of the class where it is not a choice
        1,
        "Let the early blocks learn from their objective at every n-th optimizer step only; at the others those "
        "that the task's gradient does not reach run without gradients (ours; paper: 1).",
    )
    local_step: bool = option(  # type: ignore[misc]  # of the class where it is not a choice
        False,
        "Step each early block right after its local backward and free its gradients before the next "
        "block runs (paper, App. L): the same weights with one block's gradients in memory at a time.",
    )
    reach_recompute: bool = option(  # type: ignore[misc]  # of the class where it is not a choice
        True,
        "Run a reached early block again in the backward instead of keeping its graph: one block's "
        "activations at a time, for one more forward of it.",
    )
    train_early_blocks: bool = option(  # type: ignore[misc]  # of the class where it is not a choice
        True, "Set to False to freeze early blocks and embeddings (paper's control)."
    )

    def make_method(self) -> "LoPT":
        return LoPT()

    def check(self) -> None:
        super().check()
        if self.local_objective == "none":
            self._check_without_objective()
        if self.freezes_early_blocks:
            self._check_frozen()
        if self.schedule.highest == 1:
            check_left_out(
                self,
                ["reach_recompute"],
                f"does nothing with task_reach={self.task_reach}, which reaches no early block; leave it out, or "
                "raise task_reach.",
            )

    @property
    def freezes_early_blocks(self) -> bool:
        return super().freezes_early_blocks or (self.local_objective == "none" and self.schedule.highest == 1)

    @property
    def learns_after_reach(self) -> bool:
        return self.local_objective != "none"

    @property
    def _without_objective(self) -> tuple[str, str]:
        """The setting by which there is no objective, and what brings one back."""
        return "local_objective='none'", "choose a local objective"

    def _check_frozen(self) -> None:
        trained_by = "train_early_blocks to True" if not self.train_early_blocks else "task_reach to a higher number"
        names = [*_RECONSTRUCTION, "early_learning_rate", "local_backward", "local_update_interval"]
        if self.local_objective not in ("none", self._default_objective):
            names.append("local_objective")
        check_left_out(self, names, f"does nothing where early blocks are frozen; leave it out, or set {trained_by}.")

    def _check_without_objective(self) -> None:
        reason, fix = self._without_objective
        names = (*_RECONSTRUCTION, "local_backward", "local_update_interval")
        check_left_out(self, names, f"does nothing with {reason}; leave it out, or {fix}.")
        highest = self.schedule.highest
        if 1 < highest < self.num_blocks:
            number = self.num_blocks - highest
            never = "block 0" if number == 1 else f"the first {number} blocks"
            raise ValueError(
                f"task_reach={self.task_reach} never reaches {never} of num_blocks={self.num_blocks}, and {reason} "
                f"gives nothing else to learn from; lower num_blocks to {highest}, {fix}, or add a reach of "
                f"{self.num_blocks} if the model has as many layers."
            )

    def check_run(self, run: RunFacts) -> None:
        self._check_objective(run)
        self.pick_local_backward(run)
        super().check_run(run)
        self._check_added_to_objective(run)
        self._check_local_step(run)
        if run.engine == "DeepSpeed" and self.local_update_interval > 1:
            # Its partitions of flat gradients hold zeros for what got none, so that Adam's moments go on moving it.
            raise ValueError(
                f"local_update_interval={self.local_update_interval} does not work under DeepSpeed, whose optimizer "
                "steps the early blocks at every step, with a gradient of zero too; set it to 1, or use one process, "
                "DDP or FSDP2."
            )

    def nothing_trainable(self, block: Block) -> str:
        return (
            f"train_early_blocks=True, but no parameter of block {block.index} (layers {block.start} to "
            f"{block.stop - 1}) is trainable, as after freezing it or with an adapter on later layers only; set "
            "train_early_blocks to False, or make parameters of the block trainable."
        )

    def pick_local_backward(self, run: RunFacts) -> Literal["eager", "joint"]:
        """Resolves `local_backward="auto"` to `"eager"` or `"joint"`.

        Raises:
            ValueError: If `"eager"` is asked for where the engine or the optimizer must see one backward per step.
        """
        if self.local_backward == "eager" and run.wants_one_backward is not None:
            raise ValueError(
                f"local_backward='eager' does not work under {run.wants_one_backward}, which must see one backward "
                "per step; set local_backward to 'joint' or leave it at 'auto'."
            )
        return "joint" if self.local_backward == "joint" or run.wants_one_backward is not None else "eager"

    def _check_objective(self, run: RunFacts) -> None:
        if self.local_objective != "readout":
            return
        if run.task in NEXT_TOKEN_MISFITS:
            raise ValueError(
                f"local_objective='readout' does not fit {run.task}: {NEXT_TOKEN_MISFITS[run.task]}; set it to "
                "'reconstruction'."
            )
        check_left_out(
            self,
            _RECONSTRUCTION,
            "does nothing with local_objective='readout', whose weight is 1 and which counts the tokens that have a "
            "label; leave it out, or set local_objective to 'reconstruction'.",
        )
        if run.engine not in (None, "FSDP2"):
            raise ValueError(
                f"local_objective='readout' does not work under {run.engine}, which shards the norm and head that it "
                "reads through; use FSDP2 with TRANSFORMER_BASED_WRAP, or set it to 'reconstruction'."
            )

    def _check_added_to_objective(self, run: RunFacts) -> None:
        """Refuses what would let a local objective's gradient out of its block where the task's passes through it."""
        if self.schedule.highest == 1 or self.local_objective == "none":
            return
        wrong = f"task_reach={self.task_reach} with local_objective={self.local_objective!r} does not work with"
        if not self.reach_recompute:
            raise ValueError(
                f"{wrong} reach_recompute=False, one graph of all blocks, in which the local gradient would leave its "
                "block; set reach_recompute to True, or local_objective to 'none'."
            )
        if self.schedule.highest > 2 and run.needs_one_traversal is not None:
            raise ValueError(
                f"{wrong} {run.needs_one_traversal}, while a block that the task's gradient passes through has two "
                "backwards; leave it out, lower task_reach to 2, or set local_objective to 'none'."
            )
        if run.reentrant_checkpointing:
            raise ValueError(
                f"{wrong} reentrant checkpointing, which hands no gradient back apart; set "
                "gradient_checkpointing_kwargs to {'use_reentrant': False}."
            )

    def _check_local_step(self, run: RunFacts) -> None:
        if not self.local_step:
            return
        optim = f"optim={run.optim!r}"
        joint = self.pick_local_backward(run) == "joint"
        conflicts = [
            (self.clip_scope == "global", "clip_scope='global', one norm of all blocks; set clip_scope to 'block'"),
            (self.local_backward == "joint", "local_backward='joint', one backward for all; set it to 'eager'"),
            (
                run.engine not in (None, "FSDP2"),
                f"{run.engine}, which must see one backward per step; use FSDP2 with TRANSFORMER_BASED_WRAP, DDP or "
                "one process",
            ),
            (joint, f"{optim}, which must see one backward per step; choose another"),
            (steps_in_backward(run.optim), f"{optim}, which steps in the backward; choose another"),
            (
                self.local_objective == "none" and self.freezes_early_blocks,
                "local_objective='none' and task_reach=1, which leave it nothing to do; raise task_reach",
            ),
            (not self.train_early_blocks, "train_early_blocks=False, which leaves it nothing to do; set it to True"),
            (
                self.schedule.highest > 1 and not self.reach_recompute,
                "reach_recompute=False, where all gradients come at once; set it to True",
            ),
            (run.may_save_in_mid_step, "enable_jit_checkpoint=True, which may save in mid-step; set it to False"),
            (run.is_fp16, "fp16, where an overflow in one block skips the step of all; use bf16"),
        ]
        for exists, conflict in conflicts:
            if exists:
                raise ValueError(f"local_step=True does not work with {conflict}, or set local_step to False.")


class LoPT(Method):
    """Local learning with one objective on each early block's output (https://huggingface.co/papers/2605.04913).

    Args:
        objective: The early blocks' objective. Default: the one that the arguments name.
    """

    def __init__(self, objective: LocalObjective | None = None) -> None:
        self.objective = objective

    def stage_needs(self, settings: LoPTArguments) -> Literal["part", "readout", "model"]:
        return "readout" if settings.local_objective == "readout" else "part"

    def own_name(self, settings: LoPTArguments) -> str | None:
        if settings.freezes_early_blocks:
            return "frozen early blocks"
        return "a reach schedule" if settings.local_objective == "none" else None

    def make_objective(self, learner: Learner) -> LocalObjective:
        settings: LoPTArguments = learner.settings
        if self.objective is not None:
            if settings.local_objective == "none":
                raise ValueError(
                    f"local_objective='none' leaves out {type(self.objective).__name__}, which was passed to the "
                    "trainer; leave one of them out."
                )
            return self.objective
        if settings.local_objective == "none":
            return NoObjective()
        if settings.local_objective == "readout":
            if learner.run.engine is None:
                return ReadoutObjective.from_model(learner.base_model)
            # The engine is going to shard the model's own norm and head, and to move them to the device.
            objective = ReadoutObjective.from_model(learner.base_model, copy="all")
            objective.readout.to(learner.device)
            return objective
        return ReconstructionObjective(
            settings.reconstruction_bottleneck, masked=settings.reconstruction_mask == "attention"
        )

    def make_boundary(self, learner: Learner, objective: LocalObjective, heads: LocalHeads) -> GradientBoundary:
        settings: LoPTArguments = learner.settings
        mode = settings.pick_local_backward(learner.run)
        if settings.local_backward == "auto" and mode == "eager" and not isinstance(objective, NoObjective):
            line = "local_backward='auto' is 'eager': each block's activations are freed when it is done."
            if learner.run.engine is None:
                logger.info(line)
            else:  # where it was not always so
                learner.say(f"Under {learner.run.engine} {line}")
        return GradientBoundary(
            learner.base_model,
            learner.blocks,
            objective,
            heads,
            weight=self.weight_of(learner, objective),
            mode=mode,
            router_coefficient=learner.router_coefficient,
            early_blocks=learner.early_blocks,
        )

    def weight_of(self, learner: Learner, objective: LocalObjective) -> float:
        """Returns the factor of each block's local loss."""
        if isinstance(objective, ReadoutObjective):
            return 1.0  # ZeroLock: a block learns the next token as the last one does
        settings: LoPTArguments = learner.settings
        return settings.reconstruction_weight / (len(learner.blocks) - 1)

    def warnings(self, learner: Learner) -> Iterator[str]:
        settings: LoPTArguments = learner.settings
        if learner.boundary.learns_locally and settings.local_backward == "auto" and learner.boundary.mode == "joint":
            yield (
                f"local_backward='auto' is 'joint' under {learner.run.engine or learner.run.optim}: the early blocks' "
                "activations are kept until the common backward."
            )
        yield from super().warnings(learner)

    def rate_advice(self, learner: Learner, learning_rate: float) -> str | None:
        """Warns of the paper's one rate for all blocks: it undoes what early ones knew, if no step is rounded away."""
        settings: LoPTArguments = learner.settings
        if settings.early_learning_rate is not None or settings.freezes_early_blocks:
            return None
        if not learner.boundary.learns_locally:  # the task's gradient is what end-to-end training has
            return None
        if not any(p.dtype == torch.float32 and p.requires_grad for p in learner.early_parameters()):
            return None
        return (
            f"early_learning_rate is unset, so the early blocks learn at learning_rate={learning_rate:g} as in the "
            "paper. In fp32 weights that can undo what they knew, since AdamW's step does not shrink with their small "
            f"gradient. Consider early_learning_rate={learning_rate / 10:g}; measured in recipes/smollm2-135m."
        )

    def fingerprint(self, learner: Learner, objective: LocalObjective) -> dict[str, Any]:
        settings: LoPTArguments = learner.settings
        return {
            "local_objective": type(objective).__name__,
            "readout": objective.fingerprint if isinstance(objective, ReadoutObjective) else None,
            "reconstruction_bottleneck": settings.reconstruction_bottleneck,
            "tied_embeddings": settings.tied_embeddings,
            "train_early_blocks": not settings.freezes_early_blocks,
        }
