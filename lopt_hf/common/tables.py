"""What the benchmarks' reports share."""

import os
import platform
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["describe_run", "interquartile_range", "mega", "ratio_text", "table"]

PACKAGES = ("lopt_hf", "torch", "transformers", "trl", "peft", "accelerate")


def describe_run(settings: "DataclassInstance") -> dict[str, Any]:
    """The settings, the versions and the machine of a measurement, ready for JSON."""
    return {
        "settings": {setting.name: getattr(settings, setting.name) for setting in fields(settings)},
        "versions": {package: _version(package) for package in PACKAGES},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
    }


def _version(package: str) -> str | None:
    with suppress(ModuleNotFoundError):  # lopt_hf run from a checkout that is not installed
        return version(package)
    return None


def interquartile_range(values: Sequence[float]) -> float:
    if len(values) == 1:
        return 0.0
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[2] - quartiles[0]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown of rows of cells; the second row holds the alignments."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def mega(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f}"


def ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
