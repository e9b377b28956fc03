"""The outcomes by which a report's overview and plots compare models."""

from dataclasses import dataclass
from typing import Literal

from lopt_hf.retention.results import Delta, ModelResult, RetentionReport

__all__ = ["Outcome", "main_outcomes"]


@dataclass(frozen=True)
class Outcome:
    """A quantity by which the models of a report are compared.

    Parameters:
        kind: `gain` on the task trained on, `mean` over tasks, or a single `task`.
        task: As in `Delta`.
        metric: As in `Delta`.
        higher_is_better: As in `Delta`.
    """

    kind: Literal["gain", "mean", "task"]
    task: str
    metric: str
    higher_is_better: bool

    @property
    def sign(self) -> int:
        """Factor that turns a delta into one of which more is better."""
        return 1 if self.higher_is_better else -1

    @property
    def arrow(self) -> str:
        """Arrow in the better direction, as lm-eval prints it."""
        return "↑" if self.higher_is_better else "↓"

    def of(self, result: ModelResult) -> Delta | None:
        """Returns the change of this quantity in one model; `None` if it was not measured there."""
        if self.kind == "gain":
            return result.gain
        if self.kind == "mean":
            return result.mean
        wanted = (self.task, self.metric)
        return next((delta for delta in result.deltas if (delta.task, delta.metric) == wanted), None)


def main_outcomes(report: RetentionReport) -> list[Outcome]:
    """Returns gain, mean and each task's main metric, as far as any model has them; perplexities before accuracies."""
    gains = [_outcome("gain", result.gain) for result in report.models if result.gain]
    means = [_outcome("mean", result.mean) for result in report.models if result.mean]
    tasks = dict.fromkeys(_outcome("task", delta) for result in report.models for delta in result.main_deltas())
    return [*gains[:1], *means[:1], *sorted(tasks, key=lambda outcome: outcome.higher_is_better)]


def _outcome(kind: Literal["gain", "mean", "task"], delta: Delta) -> Outcome:
    return Outcome(kind, delta.task, delta.metric, delta.higher_is_better)
