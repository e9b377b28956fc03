"""What an axis shows."""

import math

import pytest
from scipy import stats

from lopt_hf.retention.report.plots import fit_axis_range


def points(*values: float, half_width: float = 0.0) -> list[tuple[float, float, float]]:
    return [(value, value - half_width, value + half_width) for value in values]


def test_everything_is_shown_unless_it_is_far_away() -> None:
    shown = fit_axis_range(points(1.0, 2.0, 3.0, half_width=0.5))
    assert (shown.low, shown.high) == pytest.approx((-0.175, 3.675))  # zero and the intervals, with a margin


def test_fences_are_those_of_a_box_plot() -> None:
    """Of values that their quartiles make 1.5 ranges wide on either side, as scipy computes them."""
    values = [*range(1, 12), 40]
    fence = stats.scoreatpercentile(values, 75) + 1.5 * stats.iqr(values)
    for last in (fence - 0.01, 40.0):
        shown = fit_axis_range(points(*values[:-1], last))
        assert shown.contains(last) == (last < fence)


@pytest.mark.parametrize("ruined", [-88.0, 88.0, math.inf, -math.inf])
def test_what_is_far_away_is_at_the_edge(ruined: float) -> None:
    sound = [0.1 * number for number in range(20)]
    shown = fit_axis_range(points(*sound, ruined))
    assert not shown.contains(ruined)
    assert shown.clamp(ruined) == (shown.high if ruined > 0 else shown.low)
    assert all(shown.clamp(value) == value for value in sound)
    assert shown.high - shown.low < 3


def test_a_long_interval_reaches_the_edge() -> None:
    shown = fit_axis_range([*points(*[0.1 * number for number in range(20)]), (1.0, -50.0, 50.0)])
    assert shown.contains(1.0) and not shown.contains(50.0) and not shown.contains(-50.0)


@pytest.mark.parametrize("values", [[], points(0.0), points(0.0, 0.0, 0.0, 0.0, 5.0), points(math.nan)])
def test_little_to_show(values: list[tuple[float, float, float]]) -> None:
    """Of values most of which are the same, none is cut off."""
    shown = fit_axis_range(values)
    assert shown.low < 0 < shown.high
    assert all(shown.contains(value) for value, _, _ in values if math.isfinite(value))
