"""What an axis shows."""

import math

import pytest
from scipy import stats

from lopt_hf.retention.report.window import fit_window


def points(*values: float, half_width: float = 0.0) -> list[tuple[float, float, float]]:
    return [(value, value - half_width, value + half_width) for value in values]


def test_everything_is_shown_unless_it_is_far_away() -> None:
    window = fit_window(points(1.0, 2.0, 3.0, half_width=0.5))
    assert (window.low, window.high) == pytest.approx((-0.175, 3.675))  # zero and the intervals, with a margin


def test_fences_are_those_of_a_box_plot() -> None:
    """Of values that their quartiles make 1.5 ranges wide on either side, as scipy computes them."""
    values = [*range(1, 12), 40]
    fence = stats.scoreatpercentile(values, 75) + 1.5 * stats.iqr(values)
    for last in (fence - 0.01, 40.0):
        window = fit_window(points(*values[:-1], last))
        assert window.holds(last) == (last < fence)


@pytest.mark.parametrize("ruined", [-88.0, 88.0, math.inf, -math.inf])
def test_what_is_far_away_is_at_the_edge(ruined: float) -> None:
    sound = [0.1 * number for number in range(20)]
    window = fit_window(points(*sound, ruined))
    assert not window.holds(ruined)
    assert window.clamp(ruined) == (window.high if ruined > 0 else window.low)
    assert all(window.clamp(value) == value for value in sound)
    assert window.high - window.low < 3


def test_a_long_interval_reaches_the_edge() -> None:
    window = fit_window([*points(*[0.1 * number for number in range(20)]), (1.0, -50.0, 50.0)])
    assert window.holds(1.0) and not window.holds(50.0) and not window.holds(-50.0)


@pytest.mark.parametrize("values", [[], points(0.0), points(0.0, 0.0, 0.0, 0.0, 5.0), points(math.nan)])
def test_little_to_show(values: list[tuple[float, float, float]]) -> None:
    """Of values most of which are the same, none is cut off."""
    window = fit_window(values)
    assert window.low < 0 < window.high
    assert all(window.holds(value) for value, _, _ in values if math.isfinite(value))
