"""The trainers of a pipeline's stages of a language model, by the method that the early blocks learn by."""

import inspect
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTTrainer

from lopt_hf.local.learner import LocalLearner
from lopt_hf.local.methods.base import Method
from lopt_hf.local.methods.lopt import LoPT
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.local.routers import count_absent_routers, count_routers
from lopt_hf.pipeline.runtime.config import MLAANPipelineConfig, PipelineConfig
from lopt_hf.pipeline.runtime.export import save_model_files
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.stage import keep_stage, load_stage, separate_stage_embeddings
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from lopt_hf.pipeline.runtime.stage_trainer import StageMixin
from lopt_hf.trainers.checks import check_model, check_sft_dataset

__all__ = ["MLAANPipelineTrainer", "PipelineTrainer", "StageTrainer"]


class StageTrainer(StageMixin, SFTTrainer):
    """Trainer for one stage of a pipeline of local learners (PPLL, https://huggingface.co/papers/2411.12780).

    The model is one stage's part, its input comes from the previous stage and its output goes to the next one right
    after the forward. A run of K stages ends with the weights of the run in one process.

    Args:
        model: What `load_part` returns, PEFT-wrapped or not.
        args: Training arguments, the same on every stage: `PipelineArguments` mixed in before a method's config.
        world: The processes of the run.
        method: The method. Default: the one that the arguments are of.
        **kwargs: The keyword arguments of `SFTTrainer`.
    """

    _tag_names = ["trl", "sft", "ppll", "local-learning"]
    _name = "PPLL"

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: Any,
        *,
        world: PipelineWorld,
        method: Method | None = None,
        **kwargs: Any,
    ) -> None:
        part: Any = model
        given = inspect.signature(SFTTrainer.__init__).bind_partial(self, part, args, **kwargs).arguments
        check_model(part, args, given.get("peft_config"), given.get("quantization_config"))
        check_sft_dataset(given.get("train_dataset"), args, given.get("formatting_func"))
        super().__init__(part, args, world=world, method=method, **kwargs)
        if self.aux_loss_enabled:
            # TRL weighs the mean over the routers that have run, and here they are those of some layers.
            self.router_aux_loss_coef *= self._count_own_routers() / self.boundary.routers.num_routers
            # The loss is multiplied by the replicas, for tokens that were counted over all; a mean is not over them.
            self.router_aux_loss_coef /= world.num_replicas

    def _count_own_routers(self) -> int:
        """Counts the stage's routers; of a model that does not say which they are, one in each layer."""
        base_model = self.learner.base_model
        number = count_routers(base_model)
        is_known = number + count_absent_routers(base_model) > 0
        return number if is_known else self.plan.stop - self.plan.start

    @staticmethod
    def load_part(checkpoint: str, plan: StagePlan, args: Any, **kwargs: Any) -> PreTrainedModel:
        """Loads what a stage needs to begin: its part, or the whole model where its early blocks are made from it.

        Args:
            checkpoint: Hub id or local folder of the whole model's checkpoint.
            plan: The stage.
            args: Training arguments.
            **kwargs: For `from_pretrained`.
        """
        method: Method = args.make_method()
        if _needs_model(plan, method, args):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs)
            return model
        return load_stage(checkpoint, plan, keeps_readout=method.stage_needs(args) == "readout", **kwargs)

    def _make_learner(self, method: Method | None, **options: Any) -> LocalLearner:
        base_model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        separate_stage_embeddings(base_model, self.args.tied_embeddings)
        return super()._make_learner(method, **options)

    def _keep_stage(self, learner: LocalLearner) -> None:
        if _needs_model(self.plan, learner.method, self.args):
            keep_stage(learner.base_model, self.plan)

    def _save_local_state(self, staged: Path, final: Path) -> None:
        super()._save_local_state(staged, final)
        if self.plan.is_last:
            save_model_files(self, staged)


class PipelineTrainer(StageTrainer):
    """Trainer for one stage of a pipeline whose early stages learn the task a step late, or by LoPT (`gradient`).

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


def _needs_model(plan: StagePlan, method: Method, args: Any) -> bool:
    """Whether a stage begins with the whole model: its early blocks, if it has some, are made from it."""
    has_early_blocks = not plan.is_last or len(plan.blocks) > 1
    return has_early_blocks and method.stage_needs(args) == "model"
