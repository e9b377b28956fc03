"""Sizes of memory, read and written."""

import re
from dataclasses import dataclass

__all__ = ["GIB", "SizeUnit", "read_bytes", "size_text", "suitable_unit"]

GIB = 2**30
_UNITS = {"mib": 2**20, "gib": GIB, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_LARGEST = 2.0**60  # ours: more than any device has, and exact as a float
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)", re.IGNORECASE)


def read_bytes(name: str, text: str) -> int:
    """Reads a size such as `80GiB` (2^30 bytes each) or `80 GB` (10^9 bytes each).

    Args:
        name: Of the setting, for the error.
        text: Its value.

    Raises:
        ValueError: If it is none; the message says which forms there are.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match.group(2).lower() if match else ""
    size = float(match.group(1)) * _UNITS[unit] if match is not None and unit in _UNITS else 0.0
    if not 0 < size < _LARGEST:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise ValueError(
            f"{name}={shown!r} is no size of memory; write a positive number with its unit, as 80GiB (80 x 2^30 "
            "bytes) or 80GB (80 x 10^9 bytes)."
        )
    return int(size)


@dataclass(frozen=True)
class SizeUnit:
    """A unit of memory.

    Attributes:
        name: As it is printed.
        size: In bytes.
    """

    name: str
    size: int

    def count(self, size: float) -> str:
        """A size in this unit: two decimals below 100, one above."""
        value = size / self.size
        return f"{value:,.2f}" if value < 100 else f"{value:,.1f}"


def suitable_unit(largest: float) -> SizeUnit:
    """Returns the largest unit in which the largest of several sizes is at least 1; KiB for what is smaller still."""
    units = [SizeUnit("GiB", GIB), SizeUnit("MiB", 2**20), SizeUnit("KiB", 2**10)]
    return next((unit for unit in units if largest >= unit.size), units[-1])


def size_text(size: float) -> str:
    """A size with the unit that suits it."""
    unit = suitable_unit(size)
    return f"{unit.count(size)} {unit.name}"
