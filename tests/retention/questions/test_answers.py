"""The answers that can be found in another way than that of the scripts are right, and no other choice is."""

import builtins
import calendar
import http.client
import importlib
import json
import operator
import re
import subprocess
import sys
import unicodedata
import zoneinfo
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy import constants
from sympy import isprime

from lopt_hf.retention.questions.countries import COUNTRIES
from lopt_hf.retention.questions.library import METHODS
from lopt_hf.retention.questions.make import AREAS
from lopt_hf.retention.questions.measures import UNITS, UTC_OFFSETS
from lopt_hf.retention.questions.numbers import number_words, roman_numeral
from tests.retention.questions.test_files import rows_of

ROWS = [row for area in AREAS for row in rows_of(area)]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
SMALL += ["seventeen", "eighteen", "nineteen"]
VALUES = {word: number for number, word in enumerate(SMALL)}
VALUES |= {
    word: 10 * number
    for number, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
ORDINALS = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5, "last": -1}
ORDINALS |= {"second to last": -2, "third to last": -3}


def of_topic(topic: str) -> list[dict[str, Any]]:
    rows = [row for row in ROWS if row["topic"] == topic]
    assert len(rows) >= 15, topic
    return rows


def integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def calculated(text: str) -> str:
    """`a + b - c` from left to right, as there is one kind of sign only."""
    first, *rest = text.removeprefix("What is ").removesuffix("?").split(" ")
    value = Fraction(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = OPERATORS[sign](value, Fraction(number))
    return str(Fraction(value).limit_denominator())


def told(text: str) -> str:
    """The answer of a story, by the words that are in it."""
    numbers = integers(text)
    rules: tuple[tuple[str, Callable[..., int]], ...] = (
        ("gets", lambda a, b: a + b),
        ("gives.*away", lambda a, b: a - b),
        ("boxes with", lambda a, b: a * b),
        ("shared equally", lambda a, b: a // b),
        ("get back", lambda a, price, paid: paid - a * price),
        ("loose ones", lambda a, b, c: a * b + c),
        ("train", lambda hours, speed, more: hours * speed + more),
        ("times as many", lambda a, times, given: a * times - given),
        ("years old", lambda a, older, times, years: times * (a + older) + years),
    )
    (rule,) = [rule for pattern, rule in rules[::-1] if re.search(pattern, text)][:1]
    return str(rule(*numbers))


def extreme(text: str) -> str:
    shown = re.findall(r"\d[\d./]*", text.rstrip("?"))
    return (max if "largest" in text else min)(shown, key=Fraction)


def continued(text: str) -> str:
    """A polynomial of at most degree two, else a geometric sequence, else sums of the two before."""
    terms = integers(text)
    if len(set(np.diff(terms, 2))) == 1:
        return str(3 * terms[-1] - 3 * terms[-2] + terms[-3])
    if len({Fraction(b, a) for a, b in zip(terms, terms[1:], strict=False)}) == 1:
        return str(terms[-1] * terms[1] // terms[0])
    assert all(a + b == c for a, b, c in zip(terms, terms[1:], terms[2:], strict=False)), terms
    return str(terms[-1] + terms[-2])


def read_words(text: str) -> int:
    total = current = 0
    for word in text.replace("-", " ").split():
        if word == "thousand":
            total, current = 1000 * current, 0
        elif word == "hundred":
            current *= 100
        else:
            current += VALUES[word]
    return total + current


def read_roman(text: str) -> int:
    values = [dict(zip("IVXLCDM", (1, 5, 10, 50, 100, 500, 1000), strict=True))[letter] for letter in text]
    return sum(-one if one < after else one for one, after in zip(values, [*values[1:], 0], strict=True))


def part(text: str) -> str:
    *rate, whole = integers(text)
    fraction = Fraction(rate[0], 100) if rate else Fraction(1, 2 if "half" in text else 4)
    return str(fraction * whole)


def fitting(text: str) -> str:
    *shown, divisor = integers(text) if "divisible" in text else [*integers(text), 0]
    tests: dict[str, Callable[[int], bool]] = {
        "an even": lambda number: number % 2 == 0,
        "square": lambda number: int(np.sqrt(number)) ** 2 == number,
        "divisible": lambda number: number % divisor == 0,
        "prime": isprime,
    }
    (has_it,) = [test for name, test in tests.items() if name in text]
    (found,) = [number for number in shown if has_it(number)]
    return str(found)


def converted(text: str) -> str:
    factors = {(large, small): factor for large, small, factor, _ in UNITS}
    if found := re.fullmatch(r"How many (.+) are there in (\d+) (.+)\?", text):
        return str(factors[found[3], found[1]] * int(found[2]))
    found = re.fullmatch(r"How many (.+) are (\d+) (.+)\?", text)
    assert found is not None
    return str(Fraction(int(found[2]), factors[found[1], found[3]]))


def day_of_week(text: str) -> str:
    dates = [datetime.strptime(day, "%d %B %Y") for day in re.findall(r"\d+ [A-Z][a-z]+ \d{4}", text)]
    if dates:
        assert f"is a {calendar.day_name[dates[0].weekday()]}" in text
        return calendar.day_name[dates[1].weekday()]
    (today,) = [number for number, name in enumerate(calendar.day_name) if name in text]
    days = integers(text)[0] if integers(text) else 1
    return calendar.day_name[(today + (-days if "ago" in text or "before" in text else days)) % 7]


def month_name(text: str) -> str:
    (number,) = [number for number, name in enumerate(calendar.month_name) if name and name in text]
    steps = integers(text)[0] * (1 if "after" in text else -1)
    return calendar.month_name[(number - 1 + steps) % 12 + 1]


def days_between(text: str) -> str:
    one, other = (datetime.strptime(day, "%d %B %Y") for day in re.findall(r"\d+ [A-Z][a-z]+ \d{4}", text))
    return str((other - one).days)


def leap(text: str) -> str:
    (found,) = [year for year in integers(text) if calendar.isleap(year) != ("not a leap" in text)]
    return str(found)


def time_of_day(text: str) -> str:
    start = datetime.strptime(re.findall(r"\d\d:\d\d", text)[0], "%H:%M")
    number = integers(text)[2]
    step = timedelta(hours=number) if "hour" in text else timedelta(minutes=number)
    return (start - step if "ago" in text else start + step).strftime("%H:%M")


def time_elsewhere(text: str) -> str:
    zones = {city: zone for city, zone, _ in UTC_OFFSETS} | {"UTC": "UTC"}
    found = re.fullmatch(r"When it is (\d\d):00 in (.+), what time is it in (.+)\?", text)
    assert found is not None
    there = datetime(2026, 6, 15, int(found[1]), tzinfo=zoneinfo.ZoneInfo(zones[found[2]]))
    return there.astimezone(zoneinfo.ZoneInfo(zones[found[3]])).strftime("%H:%M")


def quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]+)"', text)


def letters(text: str) -> str:
    *letter, word = quoted(text)
    return str(len(re.findall(letter[0], word)) if letter else len(word))


def letter(text: str) -> str:
    found = re.search(r"the ([a-z ]+) letter", text)
    assert found is not None
    return quoted(text)[0][ORDINALS[found[1]]]


def first_or_last(text: str) -> str:
    found = re.fullmatch(r"Which of the words (.+), (.+), (.+) and (.+) comes (first|last) in .*", text)
    assert found is not None
    *words, which = found.groups()
    return str(np.sort(words)[0 if which == "first" else -1])


CHECKS: dict[str, Callable[[str], str]] = {
    "addition": calculated,
    "multiplication": calculated,
    "word problem": told,
    "comparison": extreme,
    "sequence": continued,
    "percentage": part,
    "property of a number": fitting,
    "unit": converted,
    "weekday": day_of_week,
    "month": month_name,
    "date difference": days_between,
    "leap year": leap,
    "clock": time_of_day,
    "letter count": letters,
    "letter at a place": letter,
    "alphabetical order": first_or_last,
    "backwards": lambda text: "".join(reversed(quoted(text)[0])),
    "Unicode character": lambda text: unicodedata.lookup(quoted(text)[0]),
    "Unicode name": lambda text: unicodedata.name(text[-2]),
}


@pytest.mark.parametrize("topic", CHECKS)
def test_answers(topic: str) -> None:
    for row in of_topic(topic):
        assert row["choices"][row["answer"]] == CHECKS[topic](row["question"]), row


def test_numerals() -> None:
    for number in (0, 7, 13, 20, 21, 100, 101, 999, 1000, 20_020, 999_999):
        assert read_words(number_words(number)) == number
    for number in (1, 4, 9, 14, 40, 90, 400, 1999, 3999):
        assert read_roman(roman_numeral(number)) == number
    for topic, read in (("numeral", read_words), ("Roman numeral", read_roman)):
        for row in of_topic(topic):
            texts = [
                row["choices"][row["answer"]],
                *re.findall(r'"(.+)"|(?:written|is) ([IVXLCDM\d]+)', row["question"]),
            ]
            one, other = (int(text) if text.isdigit() else read(text) for text in map(joined, texts))
            assert one == other, row


def joined(found: str | tuple[str, ...]) -> str:
    return "".join(found)


def test_units() -> None:
    known = {
        "inches": constants.inch,
        "feet": constants.foot,
        "yards": constants.yard,
        "miles": constants.mile,
        "ounces": constants.oz,
        "pounds": constants.lb,
        "minutes": constants.minute,
        "hours": constants.hour,
        "days": constants.day,
        "weeks": constants.week,
        "seconds": 1,
        "meters": 1,
        "centimeters": constants.centi,
        "millimeters": constants.milli,
        "kilometers": constants.kilo,
        "hectares": constants.hectare,
        "square meters": 1,
        "square centimeters": constants.centi**2,
        "kilobytes": constants.kilo,
        "kibibytes": constants.kibi,
        "bytes": 1,
        "liters": constants.liter,
        "milliliters": constants.liter * constants.milli,
    }
    checked = [
        (large, factor, known[large] / known[small])
        for large, small, factor, _ in UNITS
        if {large, small} <= set(known)
    ]
    assert len(checked) >= 18
    for large, factor, expected in checked:
        assert factor == pytest.approx(expected), large


def test_time_zones() -> None:
    if "Asia/Tokyo" not in zoneinfo.available_timezones():
        pytest.skip("this machine has no time zones")
    for city, zone, offset in UTC_OFFSETS:
        for month in (1, 7):
            there = datetime(2026, month, 1, tzinfo=UTC).astimezone(zoneinfo.ZoneInfo(zone))
            assert there.utcoffset() == timedelta(hours=offset), city
    for row in of_topic("time zone"):
        assert row["choices"][row["answer"]] == time_elsewhere(row["question"]), row


def test_programs_print_it() -> None:
    """In another process, all in one."""
    rows = [row for topic in ("program: number", "program: text", "exception") for row in of_topic(topic)]
    script = """
import contextlib, io, json, sys
for program in json.load(sys.stdin):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        print(json.dumps(printed.getvalue().rstrip("\\n")))
    except Exception as error:
        print(json.dumps(type(error).__name__))
"""
    programs = [row["question"].partition("\n")[2] for row in rows]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        check=True,
    )
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    for row, text in zip(rows, printed, strict=True):
        assert row["choices"][row["answer"]] == text, row


def test_modules_have_what_they_are_said_to_have() -> None:
    for row in of_topic("library: module"):
        (name,) = quoted(row["question"])
        has_it = [hasattr(importlib.import_module(module), name) for module in row["choices"]]
        assert [place for place, found in enumerate(has_it) if found] == [row["answer"]], row
    types = {"list": list, "dict": dict, "str": str, "set": set}
    for kind, name, *_ in METHODS:
        assert callable(getattr(types[kind], name))


def test_country_codes() -> None:
    pytz = pytest.importorskip("pytz")
    for country in COUNTRIES:
        names = {"United Kingdom": "Britain (UK)", "South Korea": "Korea (South)"}
        listed = pytz.country_names[country.code]
        known = names.get(country.name, country.name)
        assert known.replace("and", "&") in listed.replace("and", "&") or known in listed, listed


def test_currencies_are_babels() -> None:
    numbers = pytest.importorskip("babel.numbers")
    spelled = {"pound sterling": "pound", "togrog": "tugrik", "pa'anga": "paʻanga"}
    for country in COUNTRIES:
        codes = numbers.get_territory_currencies(country.code)
        names = [unaccented(numbers.get_currency_name(code, locale="en").lower()) for code in codes]
        currency = spelled.get(country.currency, country.currency).lower()
        assert any(currency in name for name in names), (country.name, names)


def unaccented(text: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter))


def test_status_codes() -> None:
    for row in of_topic("HTTP status"):
        answer = row["choices"][row["answer"]]
        code, phrase = (
            (answer, quoted(row["question"])[0]) if answer.isdigit() else (integers(row["question"])[0], answer)
        )
        assert http.client.responses[int(code)] == phrase


def offered(text: str) -> list[str]:
    """The choices of the question that has such a text."""
    return [choice for row in ROWS if text in row["question"] for choice in row["choices"]]


def test_no_wrong_answer_is_right_too() -> None:
    """Forms that Merriam-Webster gives beside the first one, other names of a currency, what an analogy fits too."""
    for verb, also in {"sink": "sunk", "spring": "sprung", "stink": "stunk", "sing": "sung"}.items():
        assert len(offered(f'past tense of the verb "{verb}"')) == 4
        assert also not in offered(f'past tense of the verb "{verb}"')
    for verb, also in {"hide": "hid", "bite": "bit", "tread": "trod", "strive": "strived"}.items():
        assert also not in offered(f'past participle of the verb "{verb}"')
    for one, also in {"cactus": "cactuses", "fungus": "funguses", "larva": "larvas", "ox": "ox"}.items():
        assert len(offered(f'"one {one}, many ..."')) == 4
        assert also not in offered(f'"one {one}, many ..."')
    for word, also in {"lion": "den", "wheel": "bicycle", "tailor": "scissors", "string": "piano"}.items():
        assert also not in offered(f'as "{word}" is to which word')
    for country in ("Lebanon", "Syria"):
        assert "lira" not in offered(f"currency of {country} called")


def test_a_participle_does_not_fit_where_the_progressive_form_is_asked() -> None:
    """As it does after a form of "be": "the list is written to the mayor", "the dog is gone"."""
    assert [
        row["question"] for row in of_topic("agreement") if re.search(r"\b(is|are|was|were) ___", row["question"])
    ] == []


def test_an_exception_is_none_of_the_wrong_ones_too() -> None:
    for row in of_topic("exception"):
        wrong = [choice for place, choice in enumerate(row["choices"]) if place != row["answer"]]
        answer = getattr(builtins, row["choices"][row["answer"]])
        assert not issubclass(answer, tuple(getattr(builtins, name) for name in wrong)), row
