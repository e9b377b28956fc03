"""How models are evaluated: on which samples, with how many examples, in which type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lm_eval.api.task import Task

from lopt_hf.common.arithmetic import read_dtype
from lopt_hf.common.settings import check_at_least, option
from lopt_hf.retention.heldout import HELDOUT_TASK

__all__ = ["EvaluationSettings"]


@dataclass(frozen=True)
class EvaluationSettings:
    """How every model is evaluated.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    limit: int | None = option(None, "First samples of each task. Default: all.")
    samples: Mapping[str, int | Sequence[int]] = option(
        {}, "Task -> how many of its first samples, or which by number; wins over limit."
    )
    num_fewshot: int | None = option(None, "Examples in each prompt. Default: the suite's or the task's own number.")
    batch_size: int = option(8, "Requests per forward on each device.")
    dtype: str = option(
        "auto",
        "All models' weights when measuring: float32, bfloat16, float16, or auto: as the baseline was saved, but "
        "float32 where this machine is slower in bfloat16.",
    )
    apply_chat_template: bool = option(False, "Put prompts into the model's chat template.")
    max_length: int | None = option(None, "Longest input in tokens. Default: the model's.")

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_length"):
            check_at_least(name, getattr(self, name), 1, "leaves nothing to measure")
        check_at_least("num_fewshot", self.num_fewshot, 0, "is negative")
        if self.dtype != "float16":
            object.__setattr__(self, "dtype", read_dtype(self.dtype, "auto, float32, bfloat16 or float16"))
        for task, chosen in self.samples.items():
            if (chosen < 1) if isinstance(chosen, int) else (not chosen or min(chosen) < 0):
                raise ValueError(f"samples of {task!r} are {chosen}; give how many (1 or more) or a list of numbers.")

    def indices(self, task: Task) -> list[int] | None:
        """The numbers of a task's samples that are measured; `None` for all.

        Raises:
            ValueError: If a sample is asked for that the task does not have.
        """
        if task.task_name == HELDOUT_TASK:  # has a number of its own
            return None
        chosen = self.samples.get(task.task_name, self.limit)
        if chosen is None:
            return None
        available = len(task.eval_docs)
        if isinstance(chosen, int):
            return list(range(min(chosen, available)))
        if max(chosen) >= available:
            raise ValueError(
                f"samples of {task.task_name!r} name number {max(chosen)}, but it has {available}, counted from 0."
            )
        return sorted(set(chosen))  # in lm-eval's order, whose sample numbers are right for sorted lists only
