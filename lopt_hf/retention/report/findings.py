"""Findings of a report in words: in what each model is detectably worse or better than the baseline."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lopt_hf.retention.report.tables import interval_text, signed_text, value_text
from lopt_hf.retention.results import Delta, ModelResult, RetentionReport

__all__ = ["Finding", "Statement", "findings"]

NO_BREAK_SPACE = "\u00a0"

CANNOT_TELL = "Cannot tell"
# How a statement on changes whose interval includes zero begins, and which they are
OPEN_VERDICTS: dict[str, Callable[[Delta], bool]] = {
    "No change larger than the margin": lambda delta: delta.is_open and delta.is_within_margin,
    CANNOT_TELL: lambda delta: delta.is_open and not delta.is_within_margin,
}


@dataclass(frozen=True)
class Statement:
    """One sentence: its first words, the rest, and the verdict `better` or `worse` on a detectable change."""

    start: str
    text: str
    verdict: str = ""


@dataclass(frozen=True)
class Finding:
    """The statements about one model."""

    label: str
    statements: tuple[Statement, ...]


def findings(report: RetentionReport) -> list[Finding]:
    """Returns one finding for each model, in their order."""
    return [Finding(result.label, tuple(_statements(result))) for result in report.models]


def _statements(result: ModelResult) -> list[Statement]:
    statements = []
    if result.gain:
        verdict = result.gain.verdict
        known = verdict if verdict in ("better", "worse") else ""
        statements.append(Statement("Task trained on:", f"{verdict}; {_gain(result.gain)}.", known))
    deltas = [*([result.mean] if result.mean else []), *result.deltas]
    judged = [delta for delta in deltas if _has_interval(delta)]
    for verdict in ("worse", "better", "lower", "higher"):  # the latter two of metrics without a direction
        changed = [delta for delta in judged if delta.verdict == verdict]
        judgement = verdict if verdict in ("worse", "better") else ""
        if changed:
            statements.append(Statement(f"{verdict.capitalize()}:", _by_task(changed, with_change=True), judgement))
    for start, is_kind in OPEN_VERDICTS.items():
        same = [delta for delta in judged if is_kind(delta)]
        detail = {"with_detectable": True} if start == CANNOT_TELL else {}
        if judged and len(same) == len(judged) and not detail:
            samples = f"(n{NO_BREAK_SPACE}={NO_BREAK_SPACE}{_samples(result.deltas)})"
            statements.append(Statement(start, f"in any retention task {samples}."))
        elif same:
            statements.append(Statement(f"{start}:", _by_task(same, **detail)))
    unjudged = [delta for delta in deltas if not _has_interval(delta)]
    if unjudged:
        statements.append(Statement("No interval, so nothing can be told:", _by_task(unjudged)))
    return statements


def _has_interval(delta: Delta) -> bool:
    return not (math.isnan(delta.low) or math.isnan(delta.high))


def _gain(gain: Delta) -> str:
    return f"{gain.task} {gain.metric} {value_text(gain.baseline)} → {value_text(gain.value)}, {_change(gain)}"


def _change(delta: Delta) -> str:
    return f"{signed_text(delta.delta)} {interval_text(delta)}".replace(" ", NO_BREAK_SPACE)


def _by_task(deltas: Sequence[Delta], with_change: bool = False, with_detectable: bool = False) -> str:
    """Tasks with their metrics, such as `piqa acc, acc_norm; wikitext word_perplexity.`"""
    metrics: dict[str, list[str]] = {}
    for delta in deltas:
        text = f"{delta.metric} {_change(delta)}" if with_change or with_detectable else delta.metric
        if with_detectable and not math.isnan(delta.detectable):
            text += " " + f"(could have seen ±{delta.detectable:.4f})".replace(" ", NO_BREAK_SPACE)
        metrics.setdefault(delta.task, []).append(text)
    return "; ".join(f"{task} {', '.join(texts)}" for task, texts in metrics.items()) + "."


def _samples(deltas: Sequence[Delta]) -> str:
    """Numbers of samples, each once."""
    return ", ".join(f"{number} {task}" for task, number in {delta.task: delta.n for delta in deltas}.items())
