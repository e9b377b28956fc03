"""Command lines of settings dataclasses: options made from their fields, files to write, errors of one line."""

import argparse
import codecs
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lopt_hf.common.files import is_disk_full
from lopt_hf.scripts.help import without_fences

__all__ = [
    "OneLineErrors",
    "OneLineParser",
    "UsageExit",
    "add_settings",
    "check_output_files",
    "print_what_can_be_printed",
    "read_settings",
    "with_dashes",
]

SettingsT = TypeVar("SettingsT")


class UsageExit(SystemExit):
    """Ends the process with status 2, after one line that says what is wrong with what the user gave.

    Args:
        message: The line; what stands on several is put on one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2
        print(" ".join(message.split()), file=sys.stderr)


def print_what_can_be_printed() -> None:
    """Lets the output lack characters, as it does in ASCII under the locale `C`: they are then printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="backslashreplace")


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it, and whose help any terminal can print.

    It takes no abbreviations: where a command looks for one option to know which others there are, it finds none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parses as `argparse` does."""
        print_what_can_be_printed()
        return super().parse_known_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def ending_in_one_line(self) -> Iterator[None]:
        """Ends the process with one line where the block finds something wrong: with status 2, or 1 on a full disk."""
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            if not is_disk_full(error):
                raise UsageExit(f"{self.prog}: error: {error}") from error
            remedy = "What was finished is kept; free some room and run it again."
            sys.exit(f"{self.prog}: the disk is full: {error}. {remedy}")


class OneLineParser(OneLineErrors):
    """A command's parser: it keeps the lines of its texts, and its errors are one line.

    Its options have dashes and are also taken with underscores, as those of the trainers.

    Args:
        command: The name after `lopt-hf`.
        description: What the command is for.
        epilog: What follows its options, such as examples.
    """

    def __init__(self, command: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            f"lopt-hf {command}",
            description=without_fences(description or ""),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parses as `argparse` does."""
        return super().parse_args(with_dashes(sys.argv[1:] if args is None else args), namespace)

    def run(self, command: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> None:
        """Runs a command on its arguments, and ends the process with one line where its input is wrong.

        Args:
            command: What to do with the parsed arguments.
            argv: Arguments without the program's name; default: those of the process.
        """
        arguments = self.parse_args(argv)
        with self.ending_in_one_line():
            command(arguments)


def with_dashes(argv: Iterable[str]) -> list[str]:
    """Returns arguments whose option names have dashes, as the options here do; those of trainers have underscores."""
    return [re.sub(r"^--\w[\w-]*", lambda name: name[0].replace("_", "-"), argument) for argument in argv]


def _list_of(kind: Callable[[str], object], form: str) -> Callable[[str], tuple[Any, ...]]:
    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part.strip()) for part in text.strip().removeprefix("[").removesuffix("]").split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}") from error

    return read


# By a field's type: how its text is read, and what stands for it in the help
_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "N"),
    int | None: (int, "N"),
    int | str: (str, "SIZE"),
    float: (float, "X"),
    float | None: (float, "X"),
    str: (str, "NAME"),
    str | None: (str, "NAME"),
    Path: (Path, "FOLDER"),
    Path | None: (Path, "FILE"),
    tuple[int, ...]: (_list_of(int, "a comma-separated list of integers such as 2,4"), "N,N"),
    tuple[int, ...] | None: (_list_of(int, "a number or several with commas, as 8,32"), "N,N"),
    tuple[float, ...] | None: (_list_of(float, "a number or several with commas, as 20 or 20,22.5"), "X,X"),
    tuple[str, ...]: (_list_of(str, "a list of names"), "NAME,NAME"),
}


def add_settings(parser: argparse._ActionsContainer, settings: Any, leave_out: Sequence[str] = ()) -> None:
    """Adds an option for each field.

    Args:
        parser: A parser, or a group of one.
        settings: A dataclass whose fields have a `help` in their metadata; those without a default are required.
        leave_out: Names of fields that get no option.
    """
    for setting in fields(settings):
        if setting.name in leave_out:
            continue
        if setting.type is bool:
            parser.add_argument(_flag(setting.name), action="store_true", help=setting.metadata["help"])
            continue
        reader, metavar = _READERS[setting.type]
        is_required = setting.default is MISSING
        default = None if is_required else setting.default
        parser.add_argument(
            _flag(setting.name),
            type=reader,
            metavar=metavar,
            required=is_required,
            default=default,
            help=setting.metadata["help"].replace("%", "%%") + _default_text(default),
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _default_text(default: Any) -> str:
    if default is None:
        return ""
    return f" Default: {','.join(map(str, default)) if isinstance(default, tuple) else default}"


def read_settings(
    arguments: argparse.Namespace, settings: type[SettingsT], leave_out: Sequence[str] = ()
) -> SettingsT:
    """Makes settings of parsed arguments.

    Args:
        arguments: Parsed arguments.
        settings: The dataclass.
        leave_out: Names of fields that had no option.

    Raises:
        ValueError: If a value is out of range.
    """
    names = [setting.name for setting in fields(settings)]  # type: ignore[arg-type]
    return settings(**{name: getattr(arguments, name) for name in names if name not in leave_out})


def check_output_files(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Checks before anything takes time that files can be written, and that none is overwritten.

    Args:
        arguments: Parsed arguments.
        names: Those that are paths of files to write, or `None`.

    Raises:
        ValueError: If a file is there, or its folder is not, or if two of them are one.
    """
    named: dict[Path, str] = {}
    for name in names:
        path: Path | None = getattr(arguments, name)
        if path is None:
            continue
        if path.exists():
            raise ValueError(f"{name}={str(path)!r} exists and is not overwritten; choose another name.")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{name}={path}: its folder does not exist; create it or name another file.")
        if (other := named.setdefault(path.absolute(), name)) != name:
            raise ValueError(f"{name} and {other} are both {str(path)!r}; give each a file of its own.")
