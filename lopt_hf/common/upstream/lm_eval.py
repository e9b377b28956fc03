"""What the package takes from the inside of lm-eval. It is only there on an instance, so it is checked when used."""

from typing import TYPE_CHECKING

from torch import nn

from lopt_hf.common.upstream.guard import Upstream

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM

__all__ = ["filter_names", "set_model", "set_process"]

LM_EVAL = Upstream("lm-eval", "0.4.13", "0.4.14")


def set_model(language_model: "HFLM", model: nn.Module) -> None:
    """Puts another model in place of the one that lm-eval has loaded."""
    LM_EVAL.check(language_model, "_model")
    language_model._model = model


def set_process(language_model: "HFLM", index: int, count: int) -> None:
    """Tells lm-eval which share of the samples this process asks, of how many."""
    LM_EVAL.check(language_model, "_rank", "_world_size")
    language_model._rank, language_model._world_size = index, count


def filter_names(task: "Task") -> list[str]:
    """The names of a task's filters, in order."""
    LM_EVAL.check(task, "_filters")
    return [ensemble.name for ensemble in task._filters]
