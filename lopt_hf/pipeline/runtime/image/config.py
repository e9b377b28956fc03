"""Training arguments of an image classifier in a pipeline."""

from dataclasses import dataclass
from typing import ClassVar

from lopt_hf.pipeline.runtime.arguments import PipelineArguments
from lopt_hf.pipeline.runtime.config import ObjectivePipelineArguments
from lopt_hf.trainers.image import LocalImageConfig

__all__ = ["ImagePipelineConfig"]


@dataclass
class ImagePipelineConfig(ObjectivePipelineArguments, LocalImageConfig):
    """Configuration of `ImageStageTrainer`: every argument of [`LocalImageConfig`] and those of the pipeline."""

    # Beside what no pipeline has, what means nothing for images, and what the method says
    idle_options: ClassVar[tuple[str, ...]] = (
        *PipelineArguments.idle_options,
        *("tied_embeddings", "reconstruction_mask", "reconstruction_weight", "reconstruction_bottleneck"),
        *("local_objective", "label_smoothing_factor"),
    )
    _other_evaluation: ClassVar[str] = ": the saved model is measured at the end, on the images of eval_file"
