"""Parsers of the commands that take a YAML, with errors of one line."""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl import TrlParser

from lopt_hf.common.packaged import find_config
from lopt_hf.common.settings import check_choice, nearest
from lopt_hf.common.typed import check_types, check_value
from lopt_hf.common.yaml_files import load_settings
from lopt_hf.scripts.help import HelpAll, HelpFormatter, correct_help, format_sections, without_fences
from lopt_hf.scripts.settings import OneLineErrors

__all__ = [
    "check_setting",
    "chosen",
    "chosen_method",
    "is_chosen",
    "make_trl_parser",
    "parse_or_exit",
    "refuse_method",
]

CONFIG_HELP = (
    "`--config recipe.yaml` reads any of these options from a file or one of `lopt-hf recipes`; the command line wins "
    "over it."
)

# Fields whose type in transformers does not say all that they take: true is the last checkpoint
_LOOSELY_TYPED = ("resume_from_checkpoint",)


# Names that transformers takes only where the new ones are not set
_OLD_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def _names_of(arguments: Iterable[str]) -> set[str]:
    """The names of the options on a command line."""
    return {text.partition("=")[0][2:].replace("-", "_") for text in arguments if text.startswith("--")}


def _items(text: str, are_numbers: bool) -> list[str]:
    """The items of a list that is written as one word; the word itself if it is none."""
    with contextlib.suppress(ValueError):
        items = json.loads(text) if text.startswith("[") else None
        if isinstance(items, list):
            return [str(item) for item in items]
    return text.split(",") if are_numbers and "," in text else [text]


class _RecipeParser(OneLineErrors, TrlParser):
    """TRL's parser, with our loader of YAML, a check of its values' types, and a help of the common options."""

    def format_help(self) -> str:
        return format_sections(self, self.dataclass_types, shows_all=False)

    def parse_args_and_config(  # type: ignore[override]  # no command goes on with what is unknown
        self, args: Iterable[str] | None = None
    ) -> tuple[Any, ...]:
        arguments = list(sys.argv[1:] if args is None else args)
        if "--config" in arguments:
            place = arguments.index("--config")
            settings = load_settings(find_config(arguments[place + 1]))
            del arguments[place : place + 2]
            self._set_environment(settings.pop("env", {}))
            given = _names_of(arguments)
            for old, new in _OLD_NAMES.items():
                if old in given and new not in given:  # the command line wins, by whichever name
                    settings.pop(new, None)
            self._check_types(settings)
            self._check_choices(settings, arguments)
            known = {action.dest for action in self._actions}
            self._refuse("key in the YAML file", [name for name in settings if name not in known])
            self.set_defaults_with_config(**settings)
        arguments = self._spread_lists(arguments)
        try:
            *parsed, remaining = self.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        except (TypeError, json.JSONDecodeError) as error:
            problem = self._problem_of_dictionary(error, arguments)
            if problem is None:
                raise
            raise ValueError(problem) from error
        options = [text.partition("=")[0].removeprefix("--") for text in remaining if text.startswith("--")]
        self._refuse("option on the command line", options or remaining)
        return tuple(parsed)

    def _problem_of_dictionary(self, error: Exception, arguments: Sequence[str]) -> str | None:
        """What is wrong with an option that holds a dictionary, if an error is of one; it names the option."""
        values = vars(self.parse_known_args(arguments)[0])
        if isinstance(error, json.JSONDecodeError):
            unread = (name for name, value in values.items() if value == error.doc)
            return next((f"{name}={error.doc} is no JSON: {error}; correct it." for name in unread), None)
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            return None
        key = found[1]
        for name, value in values.items():
            is_text = isinstance(value, str) and value.startswith("{")
            if (is_text and f'"{key}"' in value) or (isinstance(value, dict) and key in value):
                return f"{name}={value}: there is no setting {key!r} in it; remove it or correct its name."
        return None

    def _spread_lists(self, arguments: Iterable[str]) -> list[str]:
        """Writes `--split_at '[4,8]'` and, of numbers, `--split_at 4,8` as argparse wants them: `--split_at 4 8`."""
        lists = {o: action for action in self._actions for o in action.option_strings if action.nargs in ("+", "*")}
        spread: list[str] = []
        action: argparse.Action | None = None
        for text in arguments:
            name, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
            if name:
                action = lists.get(name)
                spread.append(name if action is not None and equals else text)
            if action is None or (name and not equals):
                spread += [] if name else [text]
            else:
                spread += _items(value, action.type in (int, float))
        return spread

    def _refuse(self, what: str, names: Sequence[str]) -> None:
        """Raises where there are names, which are no options."""
        if names:
            hints = ", ".join(f"{name!r}{self._did_you_mean(name)}" for name in names)
            raise ValueError(f"unknown {what}: {hints}; remove it or correct its name.")

    def _did_you_mean(self, name: str) -> str:
        found = nearest(name.replace("-", "_"), [action.dest for action in self._actions])
        return f" (did you mean {found[0]!r}?)" if found else ""

    def _set_environment(self, variables: Any) -> None:
        check_value("env", variables, Mapping[str, Any])
        os.environ.update({name: str(value) for name, value in variables.items()})

    def _check_types(self, settings: Mapping[str, Any]) -> None:
        checked = {name: value for name, value in settings.items() if name not in _LOOSELY_TYPED}
        for dataclass_type in self.dataclass_types:
            check_types(checked, dataclass_type, parses_text=True)

    def check_setting(self, name: str, value: Any) -> None:
        """See the function of this name."""
        options = {action.dest: action for action in self._actions}
        if name not in options:
            hint = self._did_you_mean(name)
            raise ValueError(f"{name}={value!r} is no option of {self.prog}{hint}; remove it or correct its name.")
        self._check_types({name: value})
        self._check_choices({name: value}, ())
        converts = options[name].type
        if isinstance(value, str) and callable(converts):
            try:
                converts(value)
            except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
                raise ValueError(f"{name}={value!r} cannot be read: {error}.") from error

    def _check_choices(self, settings: Mapping[str, Any], arguments: Iterable[str]) -> None:
        """Compares the values that the command line does not replace; argparse compares its own only."""
        replaced = _names_of(arguments)
        for action in self._actions:
            value = settings.get(action.dest)
            if isinstance(value, str) and action.choices is not None and action.dest not in replaced:
                check_choice(action.dest, value, [str(choice) for choice in action.choices])


def make_trl_parser(command: str, description: str | None, *dataclass_types: type) -> TrlParser:
    """A parser of the fields of dataclasses, which can also come from `--config file.yaml`.

    Args:
        command: The name after `lopt-hf`.
        description: What the command is for, and examples: the docstring of its script.
        *dataclass_types: Whose fields the options are, listed in this order.
    """
    types: Any = dataclass_types
    parser = _RecipeParser(
        types,
        prog=f"lopt-hf {command}",
        usage=f"lopt-hf {command} [--config recipe.yaml] [options]",  # the default lists hundreds of options
        description=f"{without_fences(description or '')}\n{CONFIG_HELP}",
        formatter_class=HelpFormatter,
    )
    correct_help(parser, dataclass_types)
    parser.add_argument("--help-all", action=HelpAll, help="Show all options, also those seldom needed, and exit.")
    return parser


def check_setting(parser: TrlParser, name: str, value: Any) -> None:
    """Checks one value that a command is to find in its YAML, without making what the parser makes of all values.

    Args:
        parser: The command's, of `make_trl_parser`.
        name: The key.
        value: The value.

    Raises:
        ValueError: If there is no such option, or if it takes no such value; the message begins with the name.
    """
    assert isinstance(parser, _RecipeParser)
    parser.check_setting(name, value)


def chosen(name: str, argv: Sequence[str] | None, default: str) -> Any:
    """Returns the text or number that a command line or its YAML has for an option on which the others depend.

    Args:
        name: The option.
        argv: Arguments without the program's name; default: those of the process.
        default: Where neither has one.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest="value")
    parser.add_argument("--config")
    value: Any = None
    with contextlib.suppress(argparse.ArgumentError, ValueError, OSError):  # the whole parser says what is wrong
        given, _ = parser.parse_known_args(arguments)
        value = given.value
        if value is None and given.config is not None:
            value = load_settings(find_config(given.config)).get(name)
    return value if value and isinstance(value, str | int | float) else default


def is_chosen(name: str, argv: Sequence[str] | None) -> bool:
    """Tells whether a command line or its YAML sets an option.

    Args:
        name: The option.
        argv: Arguments without the program's name; default: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    settings: Mapping[str, Any] = {}
    with contextlib.suppress(argparse.ArgumentError, ValueError, OSError):  # the whole parser says what is wrong
        given, _ = parser.parse_known_args(arguments)
        settings = {} if given.config is None else load_settings(find_config(given.config))
    return name in settings or name in _names_of(arguments)


def chosen_method(argv: Sequence[str] | None, default: str = "lopt") -> str:
    """Returns the method that a command line or its YAML names, whose options have to be parsed.

    Args:
        argv: Arguments without the program's name; default: those of the process.
        default: Where neither names one.
    """
    return str(chosen("method", argv, default))


def refuse_method(command: str, argv: Sequence[str] | None, reasons: Mapping[str, str]) -> None:
    """Ends the process with one clear line where a command is asked for a method that cannot work with it.

    Args:
        command: The name after `lopt-hf`.
        argv: Arguments without the program's name; default: those of the process.
        reasons: Why not, by the method's name.
    """
    method = chosen_method(argv)
    if method in reasons:
        print(f"lopt-hf {command}: error: method={method!r} does not work here: {reasons[method]}.", file=sys.stderr)
        sys.exit(2)


def parse_or_exit(parser: TrlParser, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """Parses arguments and `--config`, and ends the process with one clear line where they are wrong.

    Args:
        parser: A `TrlParser`; its dataclasses check the values.
        argv: Arguments without the program's name; default: those of the process.
    """
    given = sys.argv[1:] if argv is None else argv
    arguments = [part for text in given for part in (text.split("=", 1) if text.startswith("--config=") else [text])]
    try:
        if arguments[-1:] == ["--config"]:
            raise ValueError("--config needs the path of a YAML file, or a name of `lopt-hf recipes`.")
        configs = [after for option, after in zip(arguments, arguments[1:], strict=False) if option == "--config"]
        if len(configs) > 1:
            raise ValueError(
                f"--config is given {len(configs)} times ({', '.join(configs)}); give one, and the other's settings "
                "as options."
            )
        return parser.parse_args_and_config(arguments)
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            message = f"there is no file {str(error.filename)!r}; check the path."
        parser.exit(2, f"{parser.prog}: error: {message}\n")
        raise AssertionError("unreachable") from error
