"""A report says how many of its comparisons stand out, how many would by chance, and what no change means."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from lopt_hf.common import statistics
from lopt_hf.common.sample_scores import MeanScores
from lopt_hf.common.statistics import difference_interval, mcnemar
from lopt_hf.retention.comparisons import adjusted, chance_line
from lopt_hf.retention.deltas import margin_of
from lopt_hf.retention.report.findings import findings
from lopt_hf.retention.report.report import render_page
from lopt_hf.retention.report.tables import to_markdown
from lopt_hf.retention.results import Contrast, Delta, ModelResult, RetentionReport

P_VALUES = [0.001, 0.02, 0.03, 0.2, 0.6, 0.9]


def delta(p: float, number: int = 0, **changes: Any) -> Delta:
    high = -0.001 if p < 0.05 else 0.01
    changes = {"margin": 0.02, "p_interval": p, **changes}
    return Delta(f"task {number}", "acc", True, 0.5, 0.49, -0.01, -0.03, high, 200, **changes)


@pytest.fixture
def report() -> RetentionReport:
    """Two models in three tasks, and two contrasts of which one has no interval."""
    deltas = [delta(p, number % 3) for number, p in enumerate(P_VALUES)]
    models = tuple(ModelResult(name, name, tuple(deltas[i : i + 3])) for name, i in (("a", 0), ("b", 3)))
    values = ("a", "b", "task 0", "acc", True, 0.1, 0.0, 0.2, 3, 0.02)
    contrasts = tuple(Contrast(*values, p_value=p) for p in (0.04, math.nan))
    return RetentionReport("base", models, {}, contrasts=contrasts)


def test_changes_and_contrasts_are_two_families(report: RetentionReport) -> None:
    found = adjusted(report)
    expected = multipletests(P_VALUES, method="holm")[1]
    first, second = (contrast.p_adjusted for contrast in found.contrasts)
    assert first == 0.04 and second is not None and math.isnan(second)
    for once_or_twice in (found, adjusted(found)):
        values = [each.p_adjusted for model in once_or_twice.models for each in model.deltas]
        assert values == pytest.approx(expected)


def test_mcnemars_test_comes_before_the_interval() -> None:
    exact = replace(delta(0.5), p_value=0.01)
    found = adjusted(RetentionReport("base", (ModelResult("a", "a", (exact, delta(0.5, 1))),), {}))
    assert [each.p_adjusted for each in found.models[0].deltas] == pytest.approx([0.02, 0.5])


def test_one_line_counts_what_stands_out(report: RetentionReport) -> None:
    assert chance_line(report) == ""
    line = chance_line(adjusted(report))
    assert line.startswith(
        "Changes tested: 6; at 95 % stand out 3, by chance alone about 0.3 would; left after Holm's correction: 1."
    )
    assert "Differences between methods tested: 1; at 95 % stand out 1" in line
    assert line in to_markdown(adjusted(report))


def test_tables_have_the_corrected_p_and_what_could_be_seen(report: RetentionReport) -> None:
    judged = replace(report.models[0].deltas[0], detectable=0.0281, num_clusters=40)
    model = replace(report.models[0], deltas=(judged, *report.models[0].deltas[1:]))
    text = to_markdown(adjusted(replace(report, models=(model, report.models[1]))))
    headers, first, *_ = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.partition("## a\n")[2].splitlines()
        if line.startswith("|") and not line.startswith("|--")
    ]
    shown = dict(zip(headers[8:], first[8:], strict=True))
    assert shown == {"n": "200 in 40 clusters", "Holm p": "0.006", "detectable": "±0.0281", "Reading": "worse"}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"margin": 0.01, "is_within_margin": True}, "no change larger than 0.01"),
        ({"margin": 0.01, "is_within_margin": False}, "cannot tell"),
        ({"margin": 0.32145, "is_within_margin": True}, "no change larger than 0.321"),
    ],
)
def test_no_change_and_cannot_tell(changes: dict[str, Any], verdict: str) -> None:
    assert delta(0.5, **changes).verdict == verdict
    contrast = Contrast("a", "b", "task", "acc", True, 0.0, -0.1, 0.1, 3, **changes)
    assert contrast.verdict == verdict.replace("change", "difference")
    assert delta(0.01, **changes).verdict == "worse"


def test_findings_tell_equality_from_too_few_samples() -> None:
    equal = delta(0.5, 0, margin=0.01, is_within_margin=True)
    unknown = delta(0.5, 1, margin=0.01, detectable=0.05)
    report = RetentionReport("base", (ModelResult("a", "a", (equal, unknown)), ModelResult("b", "b", (equal,))), {})
    first, second = findings(report)
    said = {each.start: each.text.replace("\u00a0", " ") for each in first.statements}
    assert said == {
        "No change larger than the margin:": "task 0 acc.",
        "Cannot tell:": "task 1 acc -0.0100 [-0.0300, +0.0100] (could have seen ±0.0500).",
    }
    assert [each.start for each in second.statements] == ["No change larger than the margin"]
    page = render_page(adjusted(report), {})
    assert "two one-sided tests" in page and "Changes tested: 3" in page


def test_margin_is_in_points_or_per_cent() -> None:
    """By hand; a score is what more is better of and lies between 0 and 1."""
    assert margin_of(1.0, True, 0.6) == 0.01
    assert margin_of(2.0, False, 30.0) == pytest.approx(0.6)
    assert margin_of(1.0, False, 0.9) == pytest.approx(0.009)
    assert margin_of(1.0, True, 42.0) == pytest.approx(0.42)
    assert np.isfinite(margin_of(1.0, True, 0.0))


@pytest.mark.parametrize(("kind", "reports"), [("right or wrong", 400), ("losses", 100)])
def test_false_alarms_after_holm(kind: str, reports: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of reports in which nothing has changed in any of eight tasks, at most 5 % tell a change after Holm.

    Without the correction a quarter to a third would. The bound has two standard errors of such a simulation.
    """
    monkeypatch.setattr(statistics, "RESAMPLES", 800)
    rng = np.random.default_rng(0)
    alarms = {"p": 0, "p_adjusted": 0}
    for trial in range(reports):
        deltas = []
        for number in range(8):
            if kind == "right or wrong":
                before = rng.integers(0, 2, 200).astype(float)
                after = np.where(rng.random(200) < 0.2, 1 - before, before)
                p = mcnemar(MeanScores(before), MeanScores(after))[0]
            else:
                before = rng.gamma(4, 0.5, 60)
                models = [[MeanScores(values)] for values in (before + rng.normal(0, 1, 60), before)]
                p = difference_interval(models, [[1, -1]], seed=8 * trial + number).p_value
            deltas.append(delta(p, number))
        (model,) = adjusted(RetentionReport("base", (ModelResult("a", "a", tuple(deltas)),), {})).models
        for name in alarms:
            alarms[name] += any(getattr(each, name) < 0.05 for each in model.deltas)
    assert alarms["p_adjusted"] / reports <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / reports)
    assert alarms["p"] / reports > 0.15
