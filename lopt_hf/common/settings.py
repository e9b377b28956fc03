"""Settings: their fields, and checks with one wording for each kind of mistake, which names field, value and fix."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

__all__ = [
    "check_at_least",
    "check_choice",
    "check_choices",
    "check_distinct",
    "check_folder",
    "check_left_out",
    "check_lowest",
    "nearest",
    "option",
    "suggest",
]


def option(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    """Makes a field of a settings dataclass that is also an option of a command line.

    Args:
        default: Its value where none is given; each instance gets a copy of a list or a dictionary.
        help: What the command line says of it.
        choices: The values that it may have.
    """
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    if isinstance(default, list | dict):
        return field(default_factory=partial(deepcopy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Finds the names most similar to one that is unknown, the most similar first.

    Args:
        name: The unknown name.
        known: The names there are.
        count: How many to find at the most.
        cutoff: Similarity from which a name counts, from 0 to 1 (`difflib`'s default: 0.6).
    """
    return get_close_matches(name, list(known), n=count, cutoff=cutoff)


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns the question whether the nearest name was meant; all known names if none is near."""
    known = list(known)
    found = nearest(name, known)
    return f"did you mean {found[0]!r}?" if found else f"known are {', '.join(known)}"


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Checks that a setting is one of its choices.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        (found,) = nearest(str(value), choices, cutoff=0.0)
        raise ValueError(f"{name}={value!r} is unknown, nearest is {found!r}; use {', '.join(choices)}.")


def check_choices(settings: Any, choices: Mapping[str, Sequence[str]] | None = None) -> None:
    """Checks fields by `check_choice`; of a field that holds a tuple each value.

    Args:
        settings: What has the fields.
        choices: The choices by the fields' names. Default: those of its `option` fields.

    Raises:
        ValueError: If a value is none of its choices.
    """
    if choices is None:
        choices = {each.name: each.metadata["choices"] for each in fields(settings) if "choices" in each.metadata}
    for name, allowed in choices.items():
        value = getattr(settings, name)
        for chosen in value if isinstance(value, tuple) else (value,):
            check_choice(name, chosen, allowed)


def check_at_least(name: str, value: float | None, lowest: float, problem: str = "is too small") -> None:
    """Checks the lower bound of a number; `None`, a setting left out, passes.

    Args:
        name: The setting.
        value: Its value.
        lowest: The lowest value that it may have.
        problem: What is wrong with a lower one.

    Raises:
        ValueError: If it is lower, or nan.
    """
    if value is not None and not value >= lowest:
        raise ValueError(f"{name}={value} {problem}; set it to {lowest} or more.")


def check_lowest(settings: object, lowest: Mapping[str, float]) -> None:
    """Checks fields by `check_at_least`.

    Args:
        settings: What has the fields.
        lowest: The lowest values by the fields' names.

    Raises:
        ValueError: If a value is lower.
    """
    for name, bound in lowest.items():
        check_at_least(name, getattr(settings, name), bound)


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Checks that a setting names something, and nothing twice.

    Raises:
        ValueError: If it is empty or has a value twice.
    """
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name}={values} must name at least one value, and each value once.")


def check_folder(name: str, path: str | Path | None) -> None:
    """Checks that a folder is there or can be made; `None`, a setting left out, passes.

    Args:
        name: The setting.
        path: Its value.

    Raises:
        ValueError: If a file is in its place, or in that of a folder above it.
    """
    if path is None:
        return
    folder = Path(path)
    found = next((each for each in (folder, *folder.parents) if each.exists()), None)
    if found is not None and not found.is_dir():
        where = "" if found == folder else f": {found}"
        raise ValueError(f"{name}={str(path)!r}{where} is a file; name a folder.")


def check_left_out(settings: Any, names: Iterable[str], problem: str) -> None:
    """Checks that fields have their defaults, where another value would do nothing.

    Args:
        settings: What has the fields.
        names: Those that are to be left out.
        problem: Why one does nothing, and the fix.

    Raises:
        ValueError: If one has another value than its default.
    """
    known = type(settings).__dataclass_fields__
    for name in names:
        value = getattr(settings, name)
        if value != known[name].default:
            raise ValueError(f"{name}={value!r} {problem}")
