"""The trainer of one stage of an image classifier."""

from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from lopt_hf.local.learner import LocalLearner
from lopt_hf.local.methods.base import Method
from lopt_hf.local.stacks import find_stack
from lopt_hf.pipeline.runtime.image.config import ImagePipelineConfig
from lopt_hf.pipeline.runtime.image.stage import check_stage_model, keep_image_stage
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.stage_trainer import StageMixin
from lopt_hf.trainers.image import MetricsImageTrainer, check_image_model

__all__ = ["ImageStageTrainer"]


class ImageStageTrainer(StageMixin, MetricsImageTrainer):
    """Trainer for one stage of an image classifier in a pipeline of local learners.

    A run of K stages ends with the weights of [`LocalImageTrainer`] in one process. Each stage is given the whole
    model, from which the early blocks' classifiers are made, and keeps its part.

    Args:
        model: The whole image classifier, with the same weights on every stage.
        args: Training arguments, the same on every stage.
        world: The processes of the run.
        method: The method. Default: the one that the arguments are of.
        **kwargs: The keyword arguments of `ImageTrainer`.

    Raises:
        ValueError: If the model cannot be cut into stages.
    """

    _tag_names: ClassVar[list[str]] = ["image-classification", "ppll", "local-learning"]
    _name = "PPLL of images"

    args: ImagePipelineConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: ImagePipelineConfig,
        *,
        world: PipelineWorld,
        method: Method | None = None,
        **kwargs: Any,
    ) -> None:
        check_image_model(model)
        check_stage_model(model, find_stack(model))
        super().__init__(model, args, world=world, method=method, **kwargs)

    def _keep_stage(self, learner: LocalLearner) -> None:
        keep_image_stage(learner.base_model, learner.stack, self.plan)

    def _save_local_state(self, staged: Path, final: Path) -> None:
        super()._save_local_state(staged, final)
        # What a stock model is made of again: one from random weights has no checkpoint to read it from.
        self.learner.base_model.config.save_pretrained(staged)
        processor: Any = self.processing_class
        processor.save_pretrained(staged)
