"""The trainers of a pipeline's stages, by the method that the early blocks learn by."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lopt_hf.local.methods.lopt import LoPT
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.pipeline.runtime.config import MLAANPipelineConfig, PipelineConfig
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.stage_trainer import StageTrainer

__all__ = ["MLAANPipelineTrainer", "PipelineTrainer"]


class PipelineTrainer(StageTrainer):
    """Trainer for one stage of a pipeline whose early blocks learn by LoPT.

    Args:
        model: The stage's part of the model, from `load_part`, PEFT-wrapped or not.
        args: Training arguments, the same on every stage.
        world: The processes of the run.
        local_objective: The early blocks' objective. Default: the one that `args.local_objective` names.
        **kwargs: The keyword arguments of `SFTTrainer`.
    """

    args: PipelineConfig

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PipelineConfig,
        *,
        world: PipelineWorld,
        local_objective: LocalObjective | None = None,
        **kwargs: Any,
    ) -> None:
        method = None if local_objective is None else LoPT(local_objective)
        super().__init__(model, args, world=world, method=method, **kwargs)


class MLAANPipelineTrainer(StageTrainer):
    """Trainer for one stage of a pipeline whose early blocks learn by MLAAN (https://huggingface.co/papers/2406.16633).

    Windows and averages are as `MLAANPipelineConfig` says; a run ends with the weights of a run in one process with
    the same windows and averages. An auxiliary is made of copies of deeper layers, and its translators are fitted to
    what the stock model does behind the block: so a stage with early blocks reads the whole model once, and then keeps
    its own part.

    Args:
        model: What `load_part` returns, PEFT-wrapped or not.
        args: Training arguments, the same on every stage.
        world: The processes of the run.
        **kwargs: The keyword arguments of `SFTTrainer`.
    """

    _tag_names = ["trl", "sft", "ppll", "mlaan", "local-learning"]
    _name = "PPLL with MLAAN"

    args: MLAANPipelineConfig
