"""How far an axis reaches: to Tukey's fences, so that a few diverged models do not squeeze all others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Window", "fit_window"]

FENCE = 1.5  # Tukey, Exploratory Data Analysis (1977): values further from the quartiles, in their ranges, are outside
MARGIN = 0.05  # matplotlib's own, as a share of what is shown


@dataclass(frozen=True)
class Window:
    """What an axis shows."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value is shown where it is."""
        return self.low <= value <= self.high

    def clamp(self, value: float) -> float:
        """The nearest value that is shown; an infinite one is at the edge."""
        return min(max(value, self.low), self.high)


def fit_window(values: Sequence[tuple[float, float, float]]) -> Window:
    """The window for zero, and for all values with their intervals that lie within Tukey's fences.

    Args:
        values: Each value with the ends of its interval. What is not finite does not count.
    """
    numbers = [number for value in values for number in value if math.isfinite(number)]
    if not numbers:
        return Window(-1.0, 1.0)
    first, third = np.quantile(numbers, (0.25, 0.75))
    reach = FENCE * float(third - first) or math.inf  # of equal values nothing is outside
    fences = Window(float(first) - reach, float(third) + reach)
    inner = [value for value in values if fences.holds(value[0]) and math.isfinite(value[0])]
    ends = [fences.clamp(number) for value in inner for number in value if math.isfinite(number)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = MARGIN * (high - low) or 1.0
    return Window(low - margin, high + margin)
