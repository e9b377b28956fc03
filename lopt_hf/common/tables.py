"""Tables in Markdown, their figures, and the circumstances of a measurement."""

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import numpy as np

__all__ = ["describe_run", "interquartile_range", "markdown_table", "mega", "ratio_text"]

PACKAGES = ("lopt_hf", "torch", "transformers", "trl", "peft", "accelerate")


def describe_run(settings: object) -> dict[str, Any]:
    """Returns the settings, the versions and the machine of a measurement, ready for JSON."""
    return {
        "settings": dict(vars(settings)),
        "versions": {package: _version(package) for package in PACKAGES},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
    }


def _version(package: str) -> str | None:
    with suppress(ModuleNotFoundError):  # lopt_hf run from a checkout that is not installed
        return version(package)
    return None


def interquartile_range(values: Sequence[float]) -> float:
    """Returns the distance between the quartiles; 0 for a single value."""
    first, third = np.quantile(values, (0.25, 0.75))
    return float(third - first)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,), pad: bool = False
) -> str:
    """Makes a table in Markdown.

    Args:
        header: Titles of the columns.
        rows: The cells of each row.
        text_columns: Numbers of the columns that are aligned left; the others are aligned right.
        pad: Fill cells with spaces, so that the columns stand below each other in plain text.
    """
    lines = [header, ["---" if column in text_columns else "---:" for column in range(len(header))], *rows]
    if pad:
        widths = [max(len(row[column]) for row in lines) for column in range(len(header))]
        lines[1] = [rule.rjust(width, "-") for rule, width in zip(lines[1], widths, strict=True)]
        lines = [
            [
                cell.ljust(width) if column in text_columns else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            for cells in lines
        ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def mega(size: float | None) -> str:
    """Formats a size in units of 10^6, with two decimals below 10; `None` as `-`."""
    if size is None:
        return "-"
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.2f}"


def ratio_text(ratio: float | None) -> str:
    """Formats a ratio with two decimals; `None` as `-`."""
    return "-" if ratio is None else f"{ratio:.2f}"
