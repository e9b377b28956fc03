"""YAML is read as its writer meant it, or refused with the line and the cause."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lopt_hf.common.yaml_files import load_settings, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("5E6", 5e6), ("-2e+3", -2e3), (".5e1", 5.0), ("1.e2", 100.0), ("1_0e2", 1e3)],
)
def test_numbers_with_an_exponent_are_numbers(text: str, number: float) -> None:
    assert read_yaml(f"rates: [{text}]", "it") == {"rates": [number]}


@pytest.mark.parametrize("text", ["e5", "1e", "1e-", "v1e5", "'1e-5'", "1e-5x", "1e5-3", "."])
def test_other_text_stays_text(text: str) -> None:
    assert isinstance(read_yaml(text, "it"), str)


def test_everything_else_is_as_pyyaml_reads_it() -> None:
    recipes = list((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
    assert len(recipes) > 20
    for path in recipes:
        content = path.read_text(encoding="utf-8")
        ours, theirs = read_yaml(content, path.name), yaml.safe_load(content)
        assert ours == theirs or "e-" in content
    merged = read_yaml("base: &base {a: 1, b: 2}\nrun: {<<: *base, b: 3}\n", "it")
    assert merged["run"] == {"a": 1, "b": 3}
    assert math.isnan(read_yaml(".nan", "it")) and read_yaml("", "it") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "config=.*, line 3, column 1 is not valid YAML: the key 'a' is there twice"),
        ("a: {b: 1, b: 2}\n", "line 1, column 11 .* the key 'b' is there twice"),
        ("a: [1, 2\nb: 3\n", r"line 2, column 2 is not valid YAML: expected ',' or '\]'"),
        ("a: \tb: c\n", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (BOMB, "it has more than 10,000 values with its aliases written out"),
        ("a: &a [1, *a]\n", "an alias stands inside what it refers to"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: 2024-99-99\n", "is not valid YAML: month must be in 1..12"),
        ("a: \0\n", "is not valid YAML: .*special characters are not allowed"),
        ("- a\n- b\n", "does not hold `name: value` pairs; write one pair a line"),
        ("", "does not hold `name: value` pairs"),
        ("true: 1\n", "the key True is no name"),
        ("1: 1\n", "the key 1 is no name"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_settings(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"config={path}")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; give the path of a YAML file"):
        load_settings(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        load_settings(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe\xfd")
    with pytest.raises(ValueError, match="is not valid YAML: unacceptable character .* position 3"):
        load_settings(binary)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_yaml_knows(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: é\n", encoding=encoding)
    settings: dict[str, Any] = load_settings(path)
    assert settings == {"name": "é"}
