"""Checks of values from a file against the types of a dataclass's fields."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["check_types", "check_value"]

_UNIONS = (Union, types.UnionType)
_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_PLURALS: dict[Any, str] = {str: "texts", int: "whole numbers", float: "numbers"}


def check_types(values: Mapping[str, Any], settings: type, parses_text: bool = False) -> None:
    """Checks the values of a dataclass's fields before it is made.

    Args:
        values: Values by field name; others are left to the dataclass.
        settings: The dataclass. A type that is not told apart here takes every value.
        parses_text: Whether text is converted and checked afterwards, as `argparse` does with what is no list.

    Raises:
        ValueError: At the first value of another type; the message names the key, down to the entry of a list.
    """
    hints = get_type_hints(settings)
    for setting in fields(settings):
        if setting.name not in values or values[setting.name] is setting.default:
            continue
        value, hint = values[setting.name], hints[setting.name]
        if not (parses_text and isinstance(value, str) and not _is_list(hint)):
            check_value(setting.name, value, hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Checks one value.

    Args:
        name: Its key.
        value: The value.
        hint: Its type, such as `Sequence[float]`. A whole number is a number, but true and false are none.

    Raises:
        ValueError: If it is of another type.
    """
    problem = _problem(name, value, hint)
    if problem is not None:
        raise ValueError(problem)


def _problem(name: str, value: Any, hint: Any) -> str | None:
    """What is wrong with a value, if anything is."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return _problem_of_union(name, value, hint)
    if origin is Literal:
        return None if value in arguments else _mismatch(name, value, hint)
    if hint in _NAMES:
        return None if _is_scalar(value, hint) else _mismatch(name, value, hint)
    if _is_kind(hint, Mapping):
        return _problem_of_mapping(name, value, hint)
    if _is_kind(hint, Sequence):
        return _problem_of_list(name, value, hint)
    return None


def _problem_of_union(name: str, value: Any, hint: Any) -> str | None:
    problems = [_problem(name, value, choice) for choice in get_args(hint)]
    if None in problems:
        return None
    of_entries = (problem for problem in problems if problem and not problem.startswith(f"{name}="))
    return next(of_entries, _mismatch(name, value, hint))


def _problem_of_mapping(name: str, value: Any, hint: Any) -> str | None:
    if not isinstance(value, Mapping):
        return _mismatch(name, value, hint)
    key_hint, value_hint = get_args(hint) or (Any, Any)
    for key, entry in value.items():
        if key_hint is str and not isinstance(key, str):
            return f"{name}: the key {key!r} must be text; write it in quotes."
        if problem := _problem(f"{name}.{key}", entry, value_hint):
            return problem
    return None


def _problem_of_list(name: str, value: Any, hint: Any) -> str | None:
    if not isinstance(value, list | tuple):
        return _mismatch(name, value, hint)
    entry_hint = _entry_hint(hint)
    problems = (_problem(f"{name}[{index}]", entry, entry_hint) for index, entry in enumerate(value))
    return next((problem for problem in problems if problem), None)


def _entry_hint(hint: Any) -> Any:
    """The type of a list's entries; of a tuple with several types any of them."""
    choices = [choice for choice in get_args(hint) if choice is not Ellipsis]
    return Union[tuple(choices)] if choices else Any  # noqa: UP007 - of as many as there are


def _is_kind(hint: Any, kind: type) -> bool:
    container = get_origin(hint) or hint
    return isinstance(container, type) and issubclass(container, kind)


def _is_scalar(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _mismatch(name: str, value: Any, hint: Any) -> str:
    shown = "null" if value is None else repr(value)
    fix = ""
    if isinstance(value, str) and hint in (int, float):
        fix = "; write it without quotes"
    elif isinstance(value, bool | int | float) and _takes_text(hint):
        fix = "; write it in quotes"
    return f"{name}={shown if len(shown) <= 80 else f'{shown[:77]}...'} must be {_describe(hint)}{fix}."


def _takes_text(hint: Any) -> bool:
    return str in (get_args(hint) if get_origin(hint) in _UNIONS else (hint,))


def _is_list(hint: Any) -> bool:
    """Whether a type is a list, or a list or null."""
    choices = get_args(hint) if get_origin(hint) in _UNIONS else (hint,)
    return all(choice not in _NAMES and _is_kind(choice, Sequence) for choice in choices if choice is not type(None))


def _describe(hint: Any) -> str:
    if get_origin(hint) in _UNIONS:
        return " or ".join(map(_describe, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if hint in _NAMES:
        return _NAMES[hint]
    if _is_kind(hint, Mapping):
        return "`name: value` pairs"
    if _is_kind(hint, Sequence):
        return f"a list of {_PLURALS.get(_entry_hint(hint), 'values')}"
    return getattr(hint, "__name__", str(hint))
