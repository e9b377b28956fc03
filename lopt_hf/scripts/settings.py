"""Command-line options made from the fields of a settings dataclass."""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

__all__ = ["add_settings"]


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of integers such as 2,4") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


# By a field's type: how its text is read, and what stands for it in the help
_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "N"),
    int | None: (int, "N"),
    int | str: (str, "SIZE"),
    float: (float, "SHARE"),
    str: (str, "NAME"),
    tuple[int, ...]: (_integers, "N,N"),
    tuple[int, ...] | None: (_integers, "N,N"),
    tuple[str, ...]: (_names, "NAME,NAME"),
}


def add_settings(parser: argparse.ArgumentParser, settings: Any) -> None:
    """Adds an option for each field.

    Args:
        parser: Where to.
        settings: A dataclass whose fields have a `help` in their metadata; those without a default are required.
    """
    for setting in fields(settings):
        reader, metavar = _READERS[setting.type]
        is_required = setting.default is MISSING
        default = None if is_required else setting.default
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=reader,
            metavar=metavar,
            required=is_required,
            default=default,
            help=setting.metadata["help"].replace("%", "%%") + _default_text(default),
        )


def _default_text(default: Any) -> str:
    if default is None:
        return ""
    return f" Default: {','.join(map(str, default)) if isinstance(default, tuple) else default}"
