"""The tasks of `lopt-hf bench pipeline` by their settings; each is imported where it is measured."""

from lopt_hf.bench.pipeline.settings import BenchSettings, ImagePipelineBenchSettings
from lopt_hf.bench.pipeline.task import PipelineTask

__all__ = ["task_of"]


def task_of(settings: BenchSettings) -> PipelineTask:
    """The task that settings are for."""
    if isinstance(settings, ImagePipelineBenchSettings):
        from lopt_hf.bench.pipeline.image import ImageTask

        return ImageTask()
    from lopt_hf.bench.pipeline.language import LanguageTask

    return LanguageTask()
