"""Values of other types than their fields' are refused by their keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lopt_hf.common.typed import check_types


@dataclass
class Settings:
    count: int = 1
    rate: float = 1.0
    flag: bool = False
    name: str = "a"
    maybe: int | None = None
    either: str | list[str] = "a"
    rates: Sequence[float] = ()
    pairs: Sequence[Sequence[str]] = ()
    pair: tuple[int, str] = (1, "a")
    methods: Mapping[str, Mapping[str, Any]] | None = None
    samples: Mapping[str, int | Sequence[int]] | None = None
    kind: Literal["a", "b"] = "a"
    names: list[str] | None = None


@pytest.mark.parametrize(
    "values",
    [
        {"count": 3, "rate": 1, "flag": True, "name": "", "maybe": None, "either": ["b"], "rates": [1, 2.5]},
        {"pairs": [["a", "b"]], "pair": [1, "b"], "methods": {"a": {"x": None}}, "samples": {"a": 3, "b": [1, 2]}},
        {"maybe": 3, "either": "b", "rates": (), "methods": {}, "kind": "b", "another": object()},
    ],
)
def test_values_that_fit(values: dict[str, Any]) -> None:
    check_types(values, Settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "8"}, "count='8' must be a whole number; write it without quotes."),
        ({"count": 1.5}, "count=1.5 must be a whole number."),
        ({"count": True}, "count=True must be a whole number."),
        ({"count": None}, "count=null must be a whole number."),
        ({"rate": "two"}, "rate='two' must be a number; write it without quotes."),
        ({"flag": 1}, "flag=1 must be true or false."),
        ({"name": 5}, "name=5 must be text; write it in quotes."),
        ({"name": False}, "name=False must be text; write it in quotes."),
        ({"maybe": "x"}, "maybe='x' must be a whole number or null."),
        ({"either": [1]}, "either[0]=1 must be text; write it in quotes."),
        ({"either": 1}, "either=1 must be text or a list of texts; write it in quotes."),
        ({"rates": 3}, "rates=3 must be a list of numbers."),
        ({"rates": "1"}, "rates='1' must be a list of numbers."),
        ({"rates": [1, "x"]}, "rates[1]='x' must be a number; write it without quotes."),
        ({"pairs": ["ab"]}, "pairs[0]='ab' must be a list of texts."),
        ({"pair": [1, None]}, "pair[1]=null must be a whole number or text."),
        ({"methods": ["a"]}, "methods=['a'] must be `name: value` pairs or null."),
        ({"methods": {"a": None}}, "methods.a=null must be `name: value` pairs."),
        ({"methods": {1: {}}}, "methods: the key 1 must be text; write it in quotes."),
        ({"samples": {"a": [1, "b"]}}, "samples.a[1]='b' must be a whole number; write it without quotes."),
        ({"kind": "c"}, "kind='c' must be one of a, b."),
    ],
)
def test_values_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_types(values, Settings)
    assert str(error.value) == message


def test_text_is_left_to_a_parser_that_converts_it() -> None:
    check_types({"count": "8", "rate": "1e-5", "kind": "x"}, Settings, parses_text=True)
    with pytest.raises(ValueError, match="names='a' must be a list of texts or null"):
        check_types({"names": "a"}, Settings, parses_text=True)
    with pytest.raises(ValueError, match=r"count=\[1\] must be a whole number"):
        check_types({"count": [1]}, Settings, parses_text=True)
