"""The generated problems are right, varied, reproducible, and scored the way they are written."""

import re
from collections import Counter
from fractions import Fraction

import pytest
from datasets import DatasetDict

from lopt_hf.data.word_problems import LARGEST, NAMES, THEMES, make_word_problems
from lopt_hf.rewards import last_number

NUM_TRAIN, NUM_HELDOUT = 3000, 300
SPELT_OUT = {"twice": 2, "three times": 3, "four times": 4}
CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def problems() -> DatasetDict:
    return make_word_problems(NUM_TRAIN, NUM_HELDOUT, seed=0)


def texts(problems: DatasetDict, split: str) -> list[tuple[str, str, str]]:
    """The question, the worked answer and the answer of every row."""
    rows = problems[split]
    return [(row["prompt"][0]["content"], row["completion"][0]["content"], row["answer"]) for row in rows]


def evaluate(left: int, symbol: str, right: int) -> Fraction:
    match symbol:
        case "+":
            return Fraction(left + right)
        case "-":
            return Fraction(left - right)
        case "*":
            return Fraction(left * right)
    return Fraction(left, right)


def test_rows_are_prompt_and_completion(problems: DatasetDict) -> None:
    assert {split: len(rows) for split, rows in problems.items()} == {"train": NUM_TRAIN, "test": NUM_HELDOUT}
    for row in problems["test"]:
        assert row.keys() == {"prompt", "completion", "answer"}
        assert [turn["role"] for turn in row["prompt"] + row["completion"]] == ["user", "assistant"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_worked_answers_are_right(problems: DatasetDict, split: str) -> None:
    for question, worked, answer in texts(problems, split):
        *_, last_line = worked.split("\n")
        calculations = CALCULATION.findall(worked)
        assert 1 <= len(calculations) <= 3, worked
        for left, symbol, right, result in calculations:
            assert evaluate(int(left), symbol, int(right)) == int(result), worked
            assert int(result) <= LARGEST < 1000, worked
        for (*_, reached), (left, _, right, _) in zip(calculations, calculations[1:], strict=False):
            assert reached in (left, right), f"a step does not start from the one before: {worked}"
        assert last_line == f"#### {calculations[-1][-1]}" == f"#### {answer}", worked
        assert "{" not in question + worked and "  " not in question + worked


def test_every_number_of_the_question_is_used(problems: DatasetDict) -> None:
    """The worked answer reckons with the numbers the question tells, no others but its own results."""
    for question, worked, _ in texts(problems, "train"):
        told = Counter(re.findall(r"\d+", question))
        told.update(str(number) for words, number in SPELT_OUT.items() for _ in re.findall(words, question))
        reckoned: Counter[str] = Counter()
        for left, _, right, result in CALCULATION.findall(worked):
            reckoned.update([left, right])
            reckoned.subtract([result])
        reckoned[worked.rpartition("#### ")[2]] += 1  # the result that no later step uses
        assert +told == +reckoned, (question, worked)


def test_forms_are_many(problems: DatasetDict) -> None:
    names = re.compile("|".join(NAMES))
    units = re.compile("|".join(unit for theme in THEMES for unit in theme["units"]))
    forms = {re.sub(r"\d+", "#", names.sub("@", question)) for question, _, _ in texts(problems, "train")}
    assert len(forms) >= 1000
    assert len({units.sub("things", form) for form in forms}) >= 300


def test_all_operations_and_lengths_occur_often(problems: DatasetDict) -> None:
    calculations = [CALCULATION.findall(worked) for _, worked, _ in texts(problems, "train")]
    lengths = Counter(len(steps) for steps in calculations)
    symbols = Counter(symbol for steps in calculations for _, symbol, _, _ in steps)
    assert lengths.keys() == {1, 2, 3} and min(lengths.values()) > NUM_TRAIN / 10
    assert symbols.keys() == set("+-*/") and min(symbols.values()) > NUM_TRAIN / 10
    assert Counter(answer for _, _, answer in texts(problems, "train")).most_common(1)[0][1] < NUM_TRAIN / 10


def test_problems_are_short(problems: DatasetDict) -> None:
    """Words, numbers' digits and marks, as a GPT-like tokenizer cuts them, stay near 110."""
    lengths = [len(re.findall(r"[A-Za-z]+|[^A-Za-z\s]", q + w)) for q, w, _ in texts(problems, "train")]
    assert max(lengths) <= 120


def test_heldout_shares_no_text(problems: DatasetDict) -> None:
    train, heldout = ({question for question, _, _ in texts(problems, split)} for split in ("train", "test"))
    assert len(train) == NUM_TRAIN and len(heldout) == NUM_HELDOUT
    assert not train & heldout


def test_seed_decides() -> None:
    first, again, other = (make_word_problems(20, 5, seed) for seed in (1, 1, 2))
    assert texts(first, "train") == texts(again, "train") and texts(first, "test") == texts(again, "test")
    assert texts(first, "train") != texts(other, "train")


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (-1, 5)])
def test_sizes_must_be_positive(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_word_problems(*sizes, seed=0)


def test_the_last_number_of_a_worked_answer_is_its_answer(problems: DatasetDict) -> None:
    assert all(last_number(worked) == int(answer) for _, worked, answer in texts(problems, "test"))
