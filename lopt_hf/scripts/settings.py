"""Command lines of settings dataclasses: options made from their fields, files to write, errors of one line."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

__all__ = ["OneLineParser", "add_settings", "check_output_folders", "read_settings"]

SettingsT = TypeVar("SettingsT")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


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


def read_settings(arguments: argparse.Namespace, settings: type[SettingsT]) -> SettingsT:
    """Makes settings of parsed arguments.

    Raises:
        ValueError: If a value is out of range.
    """
    names = [setting.name for setting in fields(settings)]  # type: ignore[arg-type]
    return settings(**{name: getattr(arguments, name) for name in names})


def check_output_folders(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Checks before anything takes time that files can be written.

    Args:
        arguments: Parsed arguments.
        names: Those that are paths of files to write, or `None`.

    Raises:
        ValueError: If a file's folder does not exist.
    """
    for name in names:
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{name}={path}: its folder does not exist; create it or name another file.")
