"""MLAAN in a pipeline: every early block learns the next token through its auxiliary, and windows end at their stage.

An auxiliary is made of copies of deeper layers, and its translators are fitted to what the stock model does behind the
block. So a stage with early blocks reads the whole model once, before training, and then keeps its own part.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lopt_hf.local.blocks import Block
from lopt_hf.local.methods.mlaan.leaps import even_leaps, leap_counts
from lopt_hf.local.objectives import LocalObjective, ReconstructionObjective
from lopt_hf.mlaan.config import MLAANConfig
from lopt_hf.mlaan.trainer import MLAANTrainer
from lopt_hf.pipeline.runtime.config import PipelineArguments
from lopt_hf.pipeline.runtime.runner import PipelineMixin
from lopt_hf.pipeline.runtime.stage import StagePlan, keep_stage, load_stage
from lopt_hf.pipeline.split.costs import ModelCosts, PartCost

__all__ = ["MLAANPipelineConfig", "MLAANPipelineTrainer", "with_auxiliaries"]


@dataclass
class MLAANPipelineConfig(PipelineArguments, MLAANConfig):
    """Configuration of [`MLAANPipelineTrainer`]: every argument of [`MLAANConfig`] and those of the pipeline.

    A window that would begin on an earlier stage begins with the first block of its own, so with one block per stage
    every window is of one block. A moving average stands beside copies of layers of the same stage only: what later
    stages learn does not travel backwards, so the copy of a layer of theirs trains alone.

    Parameters:
        window: As in `MLAANConfig`, inside a stage. Ours: 1, since a stage has one block by default.
    """

    window: int = field(
        default=1,
        metadata={"help": "Number of adjacent blocks that a loss reaches, at most those of its stage (ours: 1)."},
    )

    def _check_pipeline(self) -> None:
        super()._check_pipeline()
        if self.window == self.num_blocks:
            raise ValueError(
                f"window={self.window} is num_blocks, which is end-to-end training: its gradients cross stages; lower "
                "window, or train in one process."
            )
        for name in ("ema_decay", "ema_layers", "combine"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.num_stages == self.num_blocks and value != default:
                raise ValueError(
                    f"{name}={value!r} does nothing with one block per stage, where no leapt layer is on the stage of "
                    "its block; leave it out, or set num_blocks above num_stages."
                )
        if self.readout == "ema":
            raise ValueError(
                "readout='ema' follows a norm and LM head that only the last stage has; set it to 'frozen' or "
                "'trainable'."
            )
        if self.split == "auto" and self.split_at is None and self.leap_layers is not None:
            raise ValueError(
                f"split='auto' with leap_layers={self.leap_layers}: the cut decides which layers follow a block; set "
                "leap_share instead, or give split_at."
            )


class MLAANPipelineTrainer(PipelineMixin, MLAANTrainer):
    """Trainer for one stage of a pipeline whose early blocks learn by MLAAN (https://huggingface.co/papers/2406.16633).

    What differs from [`MLAANTrainer`]: what differs for every stage (`PipelineMixin`), and windows and averages as
    `MLAANPipelineConfig` says. A run ends with the weights of a run in one process with the same windows and averages.

    Args:
        model: What `load_part` returns, PEFT-wrapped or not: the whole model, of which the stage's part is kept.
        args: Training arguments, the same on every stage.
        world: The processes of the run.
        **kwargs: The other arguments of `MLAANTrainer`.
    """

    _tag_names = ["trl", "sft", "ppll", "mlaan", "local-learning"]
    _name = "PPLL with MLAAN"

    args: MLAANPipelineConfig

    @staticmethod
    def load_part(checkpoint: str, plan: StagePlan, args: MLAANPipelineConfig, **kwargs: Any) -> PreTrainedModel:
        """Loads what a stage needs to begin: the whole model, if a block of it learns through an auxiliary.

        Args:
            checkpoint: Hub id or local folder of the whole model's checkpoint.
            plan: The stage.
            args: Training arguments.
            **kwargs: For `from_pretrained`.
        """
        if _learns_locally(plan):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs)
            return model
        return load_stage(checkpoint, plan, **kwargs)

    def _make_objective(self, base_model: PreTrainedModel) -> LocalObjective:
        # Without an early block nothing learns from it, and a copy of the head is large.
        return super()._make_objective(base_model) if self.early_blocks else ReconstructionObjective()

    def _make_local_heads(self, base_model: PreTrainedModel) -> nn.ModuleDict:
        heads = super()._make_local_heads(base_model)
        if _learns_locally(self.plan):
            keep_stage(base_model, self.plan)
        self._collect_start_losses()
        return heads

    def _collect_start_losses(self) -> None:
        """Hands the losses before training to the process that reports, which logs them."""
        store = self.world.new_run_store()
        if self.world.replica != 0:
            return
        store.set(str(self.plan.index), json.dumps(self.start_losses))
        if self.world.reports:
            for plan in self.plans:
                self.world.monitor.wait_for(store, str(plan.index))
                self.start_losses.update(json.loads(store.get(str(plan.index))))

    def _walls(self) -> list[int]:
        return [plan.blocks[0].index for plan in self.plans]

    def _averaged(self, stop: int, leaps: Sequence[int]) -> list[int]:
        return [index for index in super()._averaged(stop, leaps) if index < self.plan.stop]

    def _num_counted_processes(self) -> int:
        return self.world.num_replicas

    def _block_settings(self) -> dict[str, Any]:
        return super()._block_settings() | {"window_walls": self._walls()}


def with_auxiliaries(costs: ModelCosts, args: MLAANPipelineConfig) -> ModelCosts:
    """What a model's parts cost where early blocks learn by MLAAN; translators and averages are left out.

    Args:
        costs: The costs with the objective `"readout"`.
        args: Training arguments.
    """
    num_layers = len(costs.layers)
    num_losses = 2 if args.independent_weight else 1
    recomputes = args.auxiliary_checkpointing and not args.activation_checkpointing  # whose costs have it already

    def objective(stop: int) -> PartCost:
        (count,) = leap_counts([Block(0, 0, stop), Block(1, stop, num_layers)], args.leap_share)
        leapt = [costs.layers[index] for index in even_leaps(stop, num_layers, count)]
        return PartCost(
            forward=sum(layer.forward for layer in leapt) + num_losses * costs.objective.forward,
            backward=sum(layer.backward + recomputes * layer.forward for layer in leapt)
            + num_losses * costs.objective.backward,
            num_trainable=sum(layer.num_trainable for layer in leapt),
        )

    return replace(costs, objectives={stop: objective(stop) for stop in range(1, num_layers)})


def _learns_locally(plan: StagePlan) -> bool:
    """Whether a stage has a block before the last one of the model."""
    return not plan.is_last or len(plan.blocks) > 1
