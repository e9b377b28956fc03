"""What many tests say together, and how many samples one needs."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["holm_adjusted", "samples_needed", "smallest_change"]


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for their number by Holm's method (1979).

    Where those that stay below a level are taken for changes, the chance that any of them is none is at most that
    level, however the tests depend on each other.

    Args:
        p_values: One for each test; `nan` for one that could not be made, which does not count.

    Returns:
        The adjusted values in the same order, at most 1; `nan` where there was none.
    """
    given: NDArray[np.float64] = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(given), np.nan)
    order = [index for index in np.argsort(given, kind="stable") if not math.isnan(given[index])]
    remaining = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(remaining * given[order]))
    return adjusted.tolist()


def samples_needed(
    change: float, variance: float, correlation: float, confidence: float = 0.95, power: float = 0.8
) -> int:
    """Returns how many samples a paired comparison needs to see a change (Miller 2024, arXiv 2411.00640, Sec. 5).

    Args:
        change: The difference between two models that is to be seen, in the metric's units.
        variance: Variance of one model's score of a sample, taken to be that of both models.
        correlation: Of both models' scores of the same sample, from -1 to 1.
        confidence: Level of the interval that has to leave out zero.
        power: How often it shall do so.

    Raises:
        ValueError: If the change is zero, or the correlation is not between -1 and 1.
    """
    if not change:
        raise ValueError(f"change={change} cannot be seen with any number of samples; give one above 0.")
    return max(2, math.ceil((_factor(correlation, confidence, power) * math.sqrt(variance) / change) ** 2))


def smallest_change(
    number: int, variance: float, correlation: float, confidence: float = 0.95, power: float = 0.8
) -> float:
    """Returns the smallest change that a paired comparison of so many samples sees; see `samples_needed`."""
    return _factor(correlation, confidence, power) * math.sqrt(variance / number)


def _factor(correlation: float, confidence: float, power: float) -> float:
    """The change over the standard deviation of a sample's score, for one sample."""
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation={correlation} is not between -1 and 1.")
    return float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)) * math.sqrt(2 * (1 - correlation))
