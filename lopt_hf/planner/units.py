"""Sizes of memory, read and written."""

import re

__all__ = ["GIB", "gibibytes", "read_bytes"]

GIB = 2**30
_UNITS = {"mib": 2**20, "gib": GIB, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}
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
    if match is None or unit not in _UNITS or float(match.group(1)) <= 0:
        raise ValueError(
            f"{name}={text!r} is no size of memory; write a positive number with its unit, as 80GiB (80 x 2^30 bytes) "
            "or 80GB (80 x 10^9 bytes)."
        )
    return int(float(match.group(1)) * _UNITS[unit])


def gibibytes(size: float) -> str:
    """A size in GiB: two decimals below 100, one above."""
    value = size / GIB
    return f"{value:,.2f}" if value < 100 else f"{value:,.1f}"
