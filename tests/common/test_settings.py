"""A wrong setting is told by its field, its value and the fix."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from lopt_hf.common.settings import (
    check_at_least,
    check_choice,
    check_choices,
    check_distinct,
    check_folder,
    check_lowest,
    nearest,
    option,
    suggest,
)


@dataclass
class Settings:
    dtype: str = "float32"
    methods: tuple[str, ...] = ("lopt", "e2e")
    steps: int = 1
    limit: int | None = None


CHOICES = {"dtype": ("float32", "bfloat16"), "methods": ("lopt", "e2e", "lora")}
LOWEST = {"steps": 1, "limit": 1}


def test_good_settings_pass():
    for settings in (Settings(), Settings("bfloat16", ("lora",), 5, 3), Settings(methods=())):
        check_choices(settings, CHOICES)
        check_lowest(settings, LOWEST)
    check_distinct("methods", ("lopt", "e2e"))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda: check_choice("dtype", "float3", CHOICES["dtype"]),
            "dtype='float3' is unknown, nearest is 'float32'; ",
        ),
        (lambda: check_choice("dtype", "?", CHOICES["dtype"]), "dtype='[?]' .*; use float32, bfloat16[.]"),
        (lambda: check_choice("dtype", None, CHOICES["dtype"]), "dtype=None is unknown"),
        (lambda: check_choices(Settings(dtype="bfloat"), CHOICES), "dtype='bfloat' is unknown"),
        (lambda: check_choices(Settings(methods=("lopt", "lor")), CHOICES), "methods='lor' .* nearest is 'lora'"),
        (lambda: check_at_least("steps", 0, 1), "steps=0 is too small; set it to 1 or more[.]"),
        (lambda: check_at_least("ratio", float("nan"), 0), "ratio=nan is too small"),
        (lambda: check_at_least("limit", 0, 1, "leaves nothing to measure"), "limit=0 leaves nothing to measure; set"),
        (lambda: check_lowest(Settings(steps=0), LOWEST), "steps=0 is too small"),
        (lambda: check_lowest(Settings(limit=-1), LOWEST), "limit=-1 is too small"),
        (lambda: check_distinct("methods", ()), r"methods=\(\) must name at least one value"),
        (lambda: check_distinct("methods", ("a", "b", "a")), "each value once"),
    ],
)
def test_bad_settings_are_explained(check, message):
    with pytest.raises(ValueError, match=message):
        check()


@pytest.mark.parametrize(("path", "where"), [("notes.txt", ""), ("notes.txt/a/b", ": notes.txt")])
def test_a_file_is_neither_a_folder_nor_above_one(path, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    for given in (path, Path(path)):
        with pytest.raises(ValueError) as refused:
            check_folder("output_dir", given)
        assert str(refused.value) == f"output_dir={path!r}{where} is a file; name a folder."
    for good in (None, "", "new/and/deep", tmp_path, tmp_path / "new"):
        check_folder("output_dir", good)


def test_similar_names_are_found():
    assert nearest("num_blcks", ["num_blocks", "seed"]) == ["num_blocks"]
    assert nearest("zzz", ["num_blocks", "seed"]) == []
    assert nearest("zzz", ["num_blocks", "seed"], cutoff=0.0) != []
    assert nearest("arc", ["arc_easy", "arc_hard", "piqa"], count=2, cutoff=0.5) == ["arc_hard", "arc_easy"]
    assert suggest("sed", ["num_blocks", "seed"]) == "did you mean 'seed'?"
    assert suggest("zzz", ["num_blocks", "seed"]) == "known are num_blocks, seed"


@dataclass
class Options:
    kind: str = option("fast", "Which one.", ("fast", "slow"))
    names: list[str] = option(["a"], "Their names.")


def test_an_option_is_a_field_with_help_and_choices():
    kind, names = fields(Options)
    assert kind.metadata == {"help": "Which one.", "choices": ["fast", "slow"]}
    assert names.metadata == {"help": "Their names."}
    one, other = Options(), Options("slow", ["b"])
    one.names.append("c")
    assert (Options().names, other.kind, other.names) == (["a"], "slow", ["b"])  # a list is not shared


def test_the_choices_of_options_are_checked():
    check_choices(Options("slow", ["anything"]))
    with pytest.raises(ValueError, match="kind='slo' is unknown, nearest is 'slow'; use fast, slow"):
        check_choices(Options("slo"))
