"""Parsing with errors of one line."""

import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from trl import TrlParser

__all__ = ["parse_or_exit"]


def parse_or_exit(parser: TrlParser, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """Parses arguments and `--config`, and ends the process with one clear line where they are wrong.

    Args:
        parser: A `TrlParser`; its dataclasses check the values.
        argv: Arguments without the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return parser.parse_args_and_config(arguments)
    except (ValueError, FileNotFoundError, yaml.YAMLError) as error:
        parser.exit(2, f"{parser.prog}: error: {_explain(parser, str(error))}\n")
        raise AssertionError("unreachable") from error


def _explain(parser: TrlParser, message: str) -> str:
    """Adds the nearest known name to the message about an unknown key of a YAML file."""
    unknown = re.findall(r"'--(\w+)'", message) if message.startswith("Unknown arguments") else []
    if not unknown:
        return message
    known = [action.dest for action in parser._actions]
    hints = []
    for key in unknown:
        nearest = difflib.get_close_matches(key, known, n=1)
        hints.append(f"{key!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else ""))
    return f"unknown key in the YAML file: {', '.join(hints)}; remove it or correct its name."
