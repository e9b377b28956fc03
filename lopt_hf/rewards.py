"""Rewards for GRPO on questions with a known answer: the last number as in GSM8K, and boxed answers.

Numbers are compared as exact fractions, so `1,234`, `1234.0` and `2468/2` are the same. `trl.rewards.accuracy_reward`
compares formulas symbolically; it needs the package `math-verify`.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

__all__ = ["boxed_answer", "boxed_reward", "gsm8k_reward", "last_number", "parse_number"]

# Commas group thousands or are no part of a number: "1,234", but not "1,2". A sign belongs to a number where no
# operand stands right before it: "-3" and "5 - -3", but not "5-3" nor "5 - 3". An exponent is Python's, "1e-05": so
# answers are written that were stored as numbers. "2 1/2" is one number.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.])[-+\u2212](?=[$\d.]))?\$?\s?"
    r"(?:(?P<whole>\d{1,9})\s(?=\d{1,9}/\d))?"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\w))?"
    r"(?:\s?/\s?(?P<denominator>\d+))?"
)
LONGEST_NUMBER = 1000  # characters; ours: Python itself refuses 4,300 digits, which a model that rambles may write
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[\d,.]+)\s*\}|(\d))\s*(?:\{\s*(-?[\d,.]+)\s*\}|(\d))")
_BOXES = ("\\boxed", "\\fbox")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|[,;!:$\s])|[$\s]")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_LEFT_OUT = re.compile(rf"(?:{_SPACING.pattern}|{_TEXT.pattern})+")
_BETWEEN_DIGITS = re.compile(rf"(?<=[\d.,]){_LEFT_OUT.pattern}(?=[.,]?\d)")
_GROUPING = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!,|,\\!)(?=\d{3})")


def last_number(text: str) -> Fraction | None:
    """The number after the last `####` of a worked answer; without one, the last number of the text.

    Args:
        text: A worked answer as in GSM8K, or a completion.

    Returns:
        `None` if there is no number, or none after the last `####`.
    """
    _, marker, tail = text.rpartition("####")
    values = [value for match in _NUMBER.finditer(tail if marker else text) if (value := _value(match)) is not None]
    if not values:
        return None
    return values[0] if marker else values[-1]


def parse_number(text: str) -> Fraction | None:
    """The value of a text that is one number: `-1,234.50`, `$3`, `3/4`, `\\frac{3}{4}`; otherwise `None`.

    A unit in `\\text{...}`, a dollar and a per cent sign are left out, as is usual in evaluations of mathematics.
    Digits with spaces or words between them are several numbers, but for `2 1/2`.
    """
    grouped = _GROUPING.sub(",", text)
    joined = _LEFT_OUT.sub("", _BETWEEN_DIGITS.sub(_parted, grouped)).replace("~", " ")
    plain = joined.rstrip(".").removesuffix("%").removesuffix("\\")
    fraction = _LATEX_FRACTION.fullmatch(plain.removeprefix("-"))
    if fraction is not None:
        top, bottom = (parse_number(fraction[i] or fraction[i + 1]) for i in (1, 3))
        return (-top if plain.startswith("-") else top) / bottom if top is not None and bottom else None
    match = _NUMBER.fullmatch(plain)
    return None if match is None else _value(match)


def boxed_answer(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` (or `\\fbox`) of a text, with its inner braces; `None` without one."""
    start = max(text.rfind(box) for box in _BOXES)
    if start < 0:
        return None
    rest = text[start:].removeprefix(_BOXES[0]).removeprefix(_BOXES[1]).lstrip()
    if not rest.startswith("{"):
        bare = re.match(r"[\w.+-]+", rest)  # `\boxed 5`
        return bare.group() if bare else None
    depth = 0
    for position, character in enumerate(rest):
        is_escaped = position > 0 and rest[position - 1] == "\\"
        depth += 0 if is_escaped else (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position].strip()
    return None  # cut off before its end


def gsm8k_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float | None]:
    """1 for a completion whose last number (after `####`, if there is one) is the answer's, 0 for others.

    Args:
        completions: Texts, or conversations whose last message counts.
        answer: For each the worked answer, `... #### 42`, or the number alone.
        **kwargs: What `GRPOTrainer` passes besides.

    Returns:
        `None`, which leaves a row out, where the answer has no number.
    """
    return _rewards(completions, answer, last_number)


def boxed_reward(completions: Sequence[Any], solution: Sequence[str], **kwargs: Any) -> list[float | None]:
    """1 for a completion whose last `\\boxed{...}` is that of the solution, 0 for others.

    Numbers are compared by value, anything else as text without spaces and decoration: for formulas that may be
    written in several ways use `trl.rewards.accuracy_reward`.

    Args:
        completions: Texts, or conversations whose last message counts.
        solution: For each the worked solution with its boxed answer.
        **kwargs: What `GRPOTrainer` passes besides.

    Returns:
        `None`, which leaves a row out, where the solution has no boxed answer, as in proofs.
    """
    return _rewards(completions, solution, _boxed_value)


def _rewards(completions: Sequence[Any], references: Sequence[str], value: Callable[[str], Any]) -> list[float | None]:
    pairs = [
        (value(_text(completion)), value(str(ref))) for completion, ref in zip(completions, references, strict=True)
    ]
    return [None if expected is None else float(given == expected) for given, expected in pairs]


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"] or "") if completion else ""


def _parted(left_out: re.Match[str]) -> str:
    """What keeps digits apart: LaTeX's unbreakable space, as in `2 1/2`, or what no number has."""
    return ";" if left_out[0].strip() else "~"


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > LONGEST_NUMBER:
        return None
    number = Fraction(match["number"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    denominator = int(match["denominator"] or 1)
    if denominator == 0:
        return None
    value = number / denominator + int(match["whole"] or 0)
    return -value if match["sign"] in ("-", "\u2212") else value


def _boxed_value(text: str) -> Fraction | str | None:
    boxed = boxed_answer(text)
    if boxed is None:
        return None
    number = parse_number(boxed)
    return _SPACING.sub("", _TEXT.sub(r"\1", boxed)).rstrip(".") or None if number is None else number
