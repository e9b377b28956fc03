"""The measures that the overview, the plots and the findings of a report share."""

from dataclasses import dataclass
from typing import Literal

from lopt_hf.retention.results import Delta, ModelResult, RetentionReport

__all__ = ["Measure", "main_measures"]


@dataclass(frozen=True)
class Measure:
    """One quantity that the models of a report can be compared by.

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
        """What a delta is multiplied by so that more is better."""
        return 1 if self.higher_is_better else -1

    @property
    def arrow(self) -> str:
        """The direction that is better, as lm-eval prints it."""
        return "↑" if self.higher_is_better else "↓"

    def of(self, result: ModelResult) -> Delta | None:
        """The change of this quantity in one model; `None` if it was not measured there."""
        if self.kind == "gain":
            return result.gain
        if self.kind == "mean":
            return result.mean
        wanted = (self.task, self.metric)
        return next((delta for delta in result.deltas if (delta.task, delta.metric) == wanted), None)


def main_measures(report: RetentionReport) -> list[Measure]:
    """Gain, mean and each task's main metric, as far as any model has them; perplexities before accuracies."""
    gains = [_measure("gain", result.gain) for result in report.models if result.gain]
    means = [_measure("mean", result.mean) for result in report.models if result.mean]
    tasks = dict.fromkeys(_measure("task", delta) for result in report.models for delta in result.main_deltas())
    return [*gains[:1], *means[:1], *sorted(tasks, key=lambda measure: measure.higher_is_better)]


def _measure(kind: Literal["gain", "mean", "task"], delta: Delta) -> Measure:
    return Measure(kind, delta.task, delta.metric, delta.higher_is_better)
