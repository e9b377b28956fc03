"""MLAAN as a method: windows of blocks, and auxiliaries through which early blocks learn the next token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.methods.base import Learner, Method
from lopt_hf.local.methods.mlaan.arguments import MLAANSettings
from lopt_hf.local.methods.mlaan.auxiliary import LeapAuxiliary
from lopt_hf.local.methods.mlaan.readouts import MovingReadoutObjective, TrainableReadoutObjective
from lopt_hf.local.methods.mlaan.setup import MAX_LOGITS, AuxiliarySetup
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.local.readout import IGNORED_LABEL, ReadoutObjective
from lopt_hf.local.windows import WindowBoundary

__all__ = ["MLAAN", "MLAAN_PAPER", "MLAANArguments"]

MLAAN_PAPER = {
    "title": "MLAAN: Scaling Supervised Local Learning with Multilaminar Leap Augmented Auxiliary Network",
    "id": "2406.16633",
    # docstyle-ignore
    "citation": """\
@inproceedings{zhang2025mlaan,
    title     = {{MLAAN: Scaling Supervised Local Learning with Multilaminar Leap Augmented Auxiliary Network}},
    author    = {Zhang, Yuming and Zhang, Shouxin and Wang, Peizhe and Zhu, Feiyu and others},
    booktitle = {AAAI Conference on Artificial Intelligence},
    year      = 2025,
    eprint    = {arXiv:2406.16633},
}""",
}


class MLAAN(Method):
    """Local learning in windows of blocks, through auxiliaries (https://huggingface.co/papers/2406.16633).

    With respect to LoPT the early blocks learn the next token through copies of a few deeper layers, and a loss
    reaches a window of adjacent blocks.

    Attributes:
        setup: What makes the auxiliaries; `None` before the learner has heads.
    """

    def __init__(self) -> None:
        self.setup: AuxiliarySetup | None = None

    def separates_embeddings(self, learner: Learner) -> bool:
        settings: MLAANSettings = learner.settings
        return settings.window < len(learner.blocks)  # the task loss reaches both otherwise, as in end-to-end training

    def stage_needs(self, settings: MLAANSettings) -> Literal["part", "readout", "model"]:
        return "model"

    def make_objective(self, learner: Learner) -> LocalObjective:
        settings: MLAANSettings = learner.settings
        if settings.readout == "ema":
            return MovingReadoutObjective(learner.base_model)
        if settings.readout == "trainable":
            return TrainableReadoutObjective(learner.base_model)
        return ReadoutObjective.from_model(learner.base_model, max_logits=MAX_LOGITS)

    def make_heads(self, learner: Learner, objective: LocalObjective) -> LocalHeads:
        settings: MLAANSettings = learner.settings
        if settings.window == len(learner.blocks):
            learner.say(
                f"window={settings.window} is num_blocks: the task loss trains all blocks, as end-to-end does."
            )
            return LocalHeads()
        if not learner.early_blocks:
            return LocalHeads()
        self.setup = AuxiliarySetup(learner, objective)
        heads = LocalHeads(self.setup.make(), learner.base_model)
        heads.train()
        self._check_averages_move(learner, objective, heads)
        return heads

    def _check_averages_move(self, learner: Learner, objective: LocalObjective, heads: LocalHeads) -> None:
        """Says so where the averages are of a type that rounds their small steps away."""
        averages = [p for made in heads.values() for p in cast(LeapAuxiliary, made).averages.parameters()]
        if isinstance(objective, MovingReadoutObjective):
            averages += objective.readout.parameters()
        rounded = {p.dtype for p in averages if p.is_floating_point() and torch.finfo(p.dtype).bits < 32}
        decay = learner.settings.ema_decay
        if rounded and 0 < 1 - decay < 0.1:
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in rounded))
            learner.say(
                f"ema_decay={decay}: in {names} weights the moving averages hardly move, as steps of {1 - decay:.2g} "
                "of the distance are rounded away; load the model in float32 (--dtype float32) and leave bf16 to "
                "autocast."
            )

    def make_boundary(self, learner: Learner, objective: LocalObjective, heads: LocalHeads) -> WindowBoundary:
        settings: MLAANSettings = learner.settings
        return WindowBoundary(
            learner.base_model,
            learner.blocks,
            objective,
            heads,
            window=settings.window,
            weights=settings.loss_weights,
            task_share=settings.task_share,
            router_coefficient=learner.router_coefficient,
            stage_starts=learner.stage_starts,
            early_blocks=learner.early_blocks,
        )

    def local_scale(
        self,
        inputs: Mapping[str, Any],
        num_items: torch.Tensor | int | None,
        accumulation_steps: int,
        num_processes: int,
    ) -> float:
        """Weighs each token as the task loss does, however many of the step's tokens the micro-batch has."""
        labels_BT = inputs.get("labels")
        if num_items is None or labels_BT is None:
            return super().local_scale(inputs, num_items, accumulation_steps, num_processes)
        counted = (labels_BT[:, 1:] != IGNORED_LABEL).sum()
        return float(counted / num_items * num_processes)

    def begin_micro_batch(self, learner: Learner, step: int) -> None:
        settings: MLAANSettings = learner.settings
        cast(WindowBoundary, learner.boundary).trains_blocks = step >= settings.auxiliary_warmup_steps

    def after_step(self, learner: Learner) -> None:
        """Moves the averages towards the live layers, norm and LM head."""
        settings: MLAANSettings = learner.settings
        for auxiliary in learner.heads.values():
            cast(LeapAuxiliary, auxiliary).update_averages(learner.stack.layers, settings.ema_decay)
        objective = cast(WindowBoundary, learner.boundary).objective
        if isinstance(objective, MovingReadoutObjective):
            objective.update(settings.ema_decay)

    def start_losses(self) -> dict[str, float]:
        return {} if self.setup is None else self.setup.start_losses

    def fingerprint(self, learner: Learner, objective: LocalObjective) -> dict[str, Any]:
        settings: MLAANSettings = learner.settings
        names = ["window", "combine", "ema_layers", "ema_decay", "translator", "readout", "tied_embeddings"]
        names += ["independent_weight", "cascaded_weight", "auxiliary_warmup_steps"]
        leaps = {index: list(cast(LeapAuxiliary, made).leaps) for index, made in learner.heads.items()}
        walls = {"window_walls": learner.stage_starts} if learner.stage_starts else {}
        frozen = {"frozen_readout": objective.fingerprint} if type(objective) is ReadoutObjective else {}
        settings_by_name = {name: getattr(settings, name) for name in names}
        return {"method": "MLAAN", "leap_layers": leaps, **settings_by_name, **walls, **frozen}


@dataclass
class MLAANArguments(MLAANSettings):
    """Arguments of MLAAN: see `MLAANSettings`."""

    def make_method(self) -> MLAAN:
        return MLAAN()
