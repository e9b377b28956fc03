"""Generated questions are right, different between the splits, and the same for the same seed."""

import re

import pytest

from lopt_hf.data.arithmetic import make_arithmetic, make_arithmetic_pairs
from lopt_hf.rewards import gsm8k_reward

EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def question_of(row):
    left, sign, right = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", row["prompt"][-1]["content"]).groups()
    return int(left), sign, int(right)


def errors(text):
    """How many of the equations in a worked answer are wrong."""
    found = EQUATION.findall(text)
    assert len(found) == 3
    return sum(int(a) + int(b) != int(result) for a, _, b, result in found)


@pytest.mark.parametrize("make", [make_arithmetic, make_arithmetic_pairs])
def test_no_question_occurs_twice(make):
    data = make(num_train=200, num_heldout=50, seed=1)
    questions = [question_of(row) for split in ("train", "test") for row in data[split]]
    assert (len(data["train"]), len(data["test"]), len(set(questions))) == (200, 50, 250)
    assert data["train"].to_list() == make(num_train=200, num_heldout=50, seed=1)["train"].to_list()
    assert data["train"].to_list() != make(num_train=200, num_heldout=50, seed=2)["train"].to_list()


def test_answers_are_right():
    for row in make_arithmetic(num_train=300, num_heldout=100, seed=0)["train"]:
        left, sign, right = question_of(row)
        assert int(row["answer"]) == (left + right if sign == "+" else left - right) >= 0


def test_chosen_is_right_and_rejected_has_one_slip():
    for row in make_arithmetic_pairs(num_train=300, num_heldout=100, seed=0)["train"]:
        left, _, right = question_of(row)
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert gsm8k_reward([chosen, rejected], answer=[str(left + right)] * 2) == [1.0, 0.0]
        assert (errors(chosen), errors(rejected)) == (0, 1)
        assert EQUATION.sub("", chosen)[:10] == EQUATION.sub("", rejected)[:10]


@pytest.mark.parametrize(("num_train", "num_heldout"), [(0, 1), (1, 0), (10**6, 1)])
def test_impossible_numbers_are_refused(num_train, num_heldout):
    with pytest.raises(ValueError, match=f"num_train={num_train}"):
        make_arithmetic(num_train, num_heldout, seed=0)
