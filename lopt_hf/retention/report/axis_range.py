"""The range of a plot's axis: up to Tukey's fences, so that a few diverged models do not squeeze all others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["AxisRange", "fit_axis_range"]

FENCE = 1.5  # Tukey, Exploratory Data Analysis (1977): values further from the quartiles, in their ranges, are outside
MARGIN = 0.05  # matplotlib's own, as a share of what is shown


@dataclass(frozen=True)
class AxisRange:
    """The lowest and the highest value that an axis shows."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Returns whether a value lies within the range."""
        return self.low <= value <= self.high

    def clamp(self, value: float) -> float:
        """Returns the nearest value within the range; for an infinite one that is an end of it."""
        return min(max(value, self.low), self.high)


def fit_axis_range(values: Sequence[tuple[float, float, float]]) -> AxisRange:
    """Fits a range around zero and all values within Tukey's fences, with their intervals.

    Args:
        values: Each value with the ends of its interval. Numbers that are not finite are left out.
    """
    numbers = [number for value in values for number in value if math.isfinite(number)]
    if not numbers:
        return AxisRange(-1.0, 1.0)
    first, third = np.quantile(numbers, (0.25, 0.75))
    reach = FENCE * float(third - first) or math.inf  # of equal values nothing is outside
    fences = AxisRange(float(first) - reach, float(third) + reach)
    inner = [value for value in values if fences.contains(value[0]) and math.isfinite(value[0])]
    ends = [fences.clamp(number) for value in inner for number in value if math.isfinite(number)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = MARGIN * (high - low) or 1.0
    return AxisRange(low - margin, high + margin)
