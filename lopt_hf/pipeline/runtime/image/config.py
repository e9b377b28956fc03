"""Training arguments of an image classifier in a pipeline."""

from dataclasses import dataclass
from typing import ClassVar

from lopt_hf.common.settings import option
from lopt_hf.pipeline.runtime.arguments import PipelineArguments
from lopt_hf.pipeline.runtime.config import ObjectivePipelineArguments
from lopt_hf.trainers.image import LocalImageConfig

__all__ = ["ImagePipelineConfig"]


@dataclass
class ImagePipelineConfig(ObjectivePipelineArguments, LocalImageConfig):
    """Configuration of `ImageStageTrainer`: every argument of [`LocalImageConfig`] and those of the pipeline.

    Parameters:
        local_objective: As in one process, where `gradient` is `"local"` or `"local_and_delayed"`; naming one makes
            `"local"` the default of `gradient`. Default there: `"classifier"`.
    """

    # Beside what no pipeline has, what means nothing for images, and what the method says
    idle_options: ClassVar[tuple[str, ...]] = (
        *PipelineArguments.idle_options,
        *("tied_embeddings", "reconstruction_mask", "reconstruction_weight", "reconstruction_bottleneck"),
        *("local_objective", "label_smoothing_factor"),
    )

    # A string after `__post_init__`
    local_objective: str = option(
        None,
        "What early stages learn from with gradient local or both: 'classifier' (default), 'readout' or "
        "'reconstruction', as in one process.",
        ["classifier", "readout", "reconstruction", "none"],
    )
    _other_evaluation: ClassVar[str] = ": the saved model is measured at the end, on the images of eval_file"
