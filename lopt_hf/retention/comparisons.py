"""Many comparisons in one report: p-values adjusted for their number, and how many stand out by chance."""

import math
from collections.abc import Sequence
from dataclasses import replace

from lopt_hf.common.inference import holm_adjusted
from lopt_hf.retention.results import Delta, RetentionReport

__all__ = ["adjusted", "chance_line"]


def adjusted(report: RetentionReport) -> RetentionReport:
    """Returns the report with p-values that are adjusted by Holm's method.

    The changes of all models in all tasks and metrics are one family of tests, the contrasts between methods another.
    The mean over tasks, the gain and single seeds are not among them: the first is made of the others, the second is
    what training was for.
    """
    values = iter(holm_adjusted([delta.p for delta in _changes(report)]))
    models = tuple(
        replace(result, deltas=tuple(replace(delta, p_adjusted=next(values)) for delta in result.deltas))
        for result in report.models
    )
    of_contrasts = holm_adjusted([contrast.p_value for contrast in report.contrasts])
    contrasts = tuple(
        replace(contrast, p_adjusted=p_value) for contrast, p_value in zip(report.contrasts, of_contrasts, strict=True)
    )
    return replace(report, models=models, contrasts=contrasts)


def chance_line(report: RetentionReport) -> str:
    """Says how many of a report's comparisons stand out, how many would by chance, and how many after Holm's method.

    Returns:
        One sentence for the changes, and one for the contrasts; empty for a report that is not `adjusted`.
    """
    families = {
        "Changes": [(delta.p, delta.p_adjusted) for delta in _changes(report)],
        "Differences between methods": [(each.p_value, each.p_adjusted) for each in report.contrasts],
    }
    sentences = [_sentence(what, family, report.confidence) for what, family in families.items()]
    return " ".join(filter(None, sentences))


def _changes(report: RetentionReport) -> list[Delta]:
    return [delta for result in report.models for delta in result.deltas]


def _sentence(what: str, family: Sequence[tuple[float, float | None]], confidence: float) -> str:
    level = 1 - confidence
    tested = [(p, corrected) for p, corrected in family if corrected is not None and not math.isnan(corrected)]
    if not tested:
        return ""
    found = sum(p < level for p, _ in tested)
    left = sum(corrected < level for _, corrected in tested)
    return (
        f"{what} tested: {len(tested)}; at {100 * confidence:g} % stand out {found}, by chance alone about "
        f"{level * len(tested):.1f} would; left after Holm's correction: {left}."
    )
