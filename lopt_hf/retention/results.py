"""Results of a retention benchmark: plain values, saved as JSON and shown by the report."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Contrast", "Delta", "ModelResult", "Outcome", "RetentionReport", "arrow", "main_outcomes"]

CANNOT_TELL = "cannot tell"
NO_INTERVAL = "too few samples to tell"
NOT_A_NUMBER = "not a number"
BEYOND = "beyond its line"


@dataclass(frozen=True)
class Delta:
    """The paired change of one metric from the baseline to a model, on the same samples.

    Parameters:
        task: lm-eval's task, or `mean of N tasks`, or `held-out answers`.
        metric: lm-eval's metric; `answer_loss` is nats per answer token.
        higher_is_better: Direction of the metric; `None` where the task names none.
        baseline: The baseline's value.
        value: The model's value; of several seeds the mean.
        delta: `value - baseline`.
        low: Lower end of the confidence interval of `delta`; `nan` where there is none.
        high: Upper end.
        n: Samples measured.
        margin: The change below which two models are taken to be equal, in the metric's units.
        p_value: McNemar's exact test, for metrics that are right or wrong per sample.
        right_to_wrong: Samples that the baseline had right and the model has wrong, for such metrics.
        wrong_to_right: The reverse.
        p_adjusted: The p-value by Holm's method over all tests of the report: McNemar's, or that of the interval.
        detectable: The smallest change that these samples would have shown, with 80 % power.
        is_within_margin: Whether the change is shown to be smaller than the margin, by two one-sided tests.
        num_clusters: How many clusters of samples that belong together were resampled; `None`: single samples.
        p_interval: p-value of the interval; `nan` where there is none.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    baseline: float
    value: float
    delta: float
    low: float
    high: float
    n: int
    margin: float
    p_value: float | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    p_adjusted: float | None = field(default=None, compare=False)  # of the report that it stands in, not its own
    detectable: float = math.nan
    is_within_margin: bool = False
    num_clusters: int | None = None
    p_interval: float = math.nan

    @property
    def p(self) -> float:
        """The p-value of no change: McNemar's where there is one, else that of the interval."""
        return self.p_interval if self.p_value is None else self.p_value

    @property
    def is_open(self) -> bool:
        """Whether there is an interval, and it includes zero: neither better nor worse."""
        known = math.isfinite(self.delta) and not math.isnan(self.low) and not math.isnan(self.high)
        return known and not (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or why neither can be said; of a metric without a direction `higher` or `lower`.

        What is neither is `no change larger than` the margin, where that is shown, and otherwise `cannot tell`.
        """
        if not math.isfinite(self.delta):
            return NOT_A_NUMBER
        if math.isnan(self.low) or math.isnan(self.high):
            return NO_INTERVAL
        if self.is_open:
            return _equality(self.margin, self.is_within_margin, "change")
        if self.higher_is_better is None:
            return "higher" if self.delta > 0 else "lower"
        return "better" if (self.delta > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class ModelResult:
    """Retention and gain of one model, or the mean over the seeds of one method at one rate.

    Parameters:
        label: Name in tables and plots, unique in a report.
        group: Models of one group share a colour, and a line where gain is drawn against retention.
        deltas: One for each task and metric; each task's first is its main one.
        mean: Mean over the main metrics that are scores from 0 to 1; `None` with fewer than two.
        gain: Loss of held-out answers of the task trained on, if such data were given.
        drift: Relative weight change `||W - W0|| / ||W0||` of the embeddings, each layer, and the rest, by name.
        seeds: The single runs behind a mean over seeds.
        similarity: Linear CKA of the hidden states that come into the first layer and out of each with the baseline's,
            by name.
        family: Groups of one family are drawn alike; empty where there are none.
        command: How the model was made, for the page.
    """

    label: str
    group: str
    deltas: tuple[Delta, ...]
    mean: Delta | None = None
    gain: Delta | None = None
    drift: Mapping[str, float] = field(default_factory=dict)
    seeds: tuple["ModelResult", ...] = ()
    similarity: Mapping[str, float] = field(default_factory=dict)
    family: str = ""
    command: str = ""

    def main_deltas(self) -> list[Delta]:
        """The first delta of each task."""
        return list({delta.task: delta for delta in reversed(self.deltas)}.values())[::-1]


@dataclass(frozen=True)
class Contrast:
    """The difference between two methods on the same samples and seeds.

    Parameters:
        first: Label of a model.
        second: Label of the model that is subtracted.
        task: lm-eval's task, or as in `Delta`.
        metric: As in `Delta`.
        higher_is_better: As in `Delta`.
        difference: `first - second`, mean over seeds; `nan` where the second's line does not reach the first's gain,
            and where both are infinite.
        low: Lower end of its confidence interval.
        high: Upper end.
        seeds: Number of seeds.
        margin: As in `Delta`.
        p_value: Of the interval.
        p_adjusted: As in `Delta`, over all contrasts.
        detectable: As in `Delta`.
        is_within_margin: As in `Delta`.
        is_beyond: Whether the second's line does not reach the first's gain.
    """

    first: str
    second: str
    task: str
    metric: str
    higher_is_better: bool | None
    difference: float
    low: float
    high: float
    seeds: int
    margin: float
    p_value: float = math.nan
    p_adjusted: float | None = None
    detectable: float = math.nan
    is_within_margin: bool = False
    is_beyond: bool = False

    @property
    def verdict(self) -> str:
        """The label of the better one, or why neither can be named, as in `Delta`.

        Of a metric without a direction, which one is higher.
        """
        if self.is_beyond:
            return BEYOND
        if math.isnan(self.difference):
            return NOT_A_NUMBER
        if math.isnan(self.low) or math.isnan(self.high):
            return NO_INTERVAL
        if not (self.low > 0 or self.high < 0):
            return _equality(self.margin, self.is_within_margin, "difference")
        higher, lower = (self.first, self.second) if self.difference > 0 else (self.second, self.first)
        if self.higher_is_better is None:
            return f"{higher} is higher"
        return higher if self.higher_is_better else lower


@dataclass(frozen=True)
class RetentionReport:
    """A whole comparison with one baseline.

    Parameters:
        baseline: The baseline's name.
        models: Results in the order given.
        settings: What was measured and how: tasks, limits, versions, machine; plain values.
        confidence: Level of all intervals.
        contrasts: Differences between methods, where several were trained with the same seeds.
    """

    baseline: str
    models: tuple[ModelResult, ...]
    settings: Mapping[str, Any]
    confidence: float = 0.95
    contrasts: tuple[Contrast, ...] = ()

    def to_json(self) -> str:
        """The report as JSON, with the verdicts spelled out; what is not a number or infinite is `null`."""
        return json.dumps(_plain(self), indent=2, allow_nan=False)

    def save(self, path: Path) -> None:
        """Writes the report as JSON."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")


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
    higher_is_better: bool | None

    @property
    def sign(self) -> int:
        """Factor that turns a delta of a metric with a direction into one of which more is better."""
        return 1 if self.higher_is_better else -1

    def of(self, result: ModelResult) -> Delta | None:
        """Returns the change of this quantity in one model; `None` if it was not measured there."""
        if self.kind == "gain":
            return result.gain
        if self.kind == "mean":
            return result.mean
        wanted = (self.task, self.metric)
        return next((delta for delta in result.deltas if (delta.task, delta.metric) == wanted), None)


def arrow(higher_is_better: bool | None) -> str:
    """Returns an arrow in the better direction, as lm-eval prints it; nothing for a metric without a direction."""
    return {True: "↑", False: "↓", None: ""}[higher_is_better]


def main_outcomes(report: RetentionReport) -> list[Outcome]:
    """Returns gain, mean and each task's main metric, as far as any model has them; perplexities before accuracies."""
    gains = [_outcome("gain", result.gain) for result in report.models if result.gain]
    means = [_outcome("mean", result.mean) for result in report.models if result.mean]
    tasks = dict.fromkeys(_outcome("task", delta) for result in report.models for delta in result.main_deltas())
    return [*gains[:1], *means[:1], *sorted(tasks, key=lambda outcome: outcome.higher_is_better is not False)]


def _equality(margin: float, is_within: bool, what: str) -> str:
    """What can be said of a difference whose interval includes zero."""
    return f"no {what} larger than {margin:.3g}" if is_within else CANNOT_TELL


def _outcome(kind: Literal["gain", "mean", "task"], delta: Delta) -> Outcome:
    return Outcome(kind, delta.task, delta.metric, delta.higher_is_better)


def _plain(value: Any) -> Any:
    """A result as JSON has it."""
    if isinstance(value, Delta | Contrast):
        return _plain({**vars(value), "verdict": value.verdict})
    if isinstance(value, ModelResult | RetentionReport):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
