"""Sums and differences of small numbers, generated: questions with a known answer, and pairs of worked answers."""

import random
from collections.abc import Callable

from datasets import Dataset, DatasetDict

__all__ = ["make_arithmetic", "make_arithmetic_pairs"]

LARGEST = 20  # operand of a question; ours: what a 135M model gets right now and then
LARGEST_OF_A_PAIR = 99  # operand of a worked answer, which has tens and ones
Row = dict[str, object]


def make_arithmetic(num_train: int, num_heldout: int, seed: int) -> DatasetDict:
    """Generates questions such as `What is 7 + 12?` with their answers, different ones for training and testing.

    Args:
        num_train: Number of questions in the split `"train"`.
        num_heldout: Number of questions in the split `"test"`.
        seed: The same seed gives the same questions.

    Returns:
        Rows of `prompt` (a list with a system and a user message) and `answer` (a number as text).

    Raises:
        ValueError: If a number is less than 1, or there are not as many different questions.
    """
    questions = [
        (a, sign, b)
        for a in range(1, LARGEST + 1)
        for b in range(1, LARGEST + 1)
        for sign in "+-"
        if a >= b or sign == "+"
    ]
    return _split(questions, _question_row, num_train, num_heldout, seed)


def make_arithmetic_pairs(num_train: int, num_heldout: int, seed: int) -> DatasetDict:
    """Generates sums of two-digit numbers with a right and a wrong worked answer, for DPO.

    The wrong answer is worked in the same words, with one slip of the ones, the tens or the last sum; what follows the
    slip is calculated from it.

    Args:
        num_train: Number of pairs in the split `"train"`.
        num_heldout: Number of pairs in the split `"test"`; their questions are not in the other.
        seed: The same seed gives the same pairs.

    Returns:
        Rows of `prompt`, `chosen` and `rejected`, each a list of messages.

    Raises:
        ValueError: If a number is less than 1, or there are not as many different questions.
    """
    questions = [(a, "+", b) for a in range(10, LARGEST_OF_A_PAIR + 1) for b in range(10, LARGEST_OF_A_PAIR + 1)]
    return _split(questions, _pair_row, num_train, num_heldout, seed)


def _split(
    questions: list[tuple[int, str, int]],
    make_row: Callable[[tuple[int, str, int], random.Random], Row],
    num_train: int,
    num_heldout: int,
    seed: int,
) -> DatasetDict:
    if num_train < 1 or num_heldout < 1:
        raise ValueError(f"num_train={num_train} and num_heldout={num_heldout} must both be at least 1.")
    if num_train + num_heldout > len(questions):
        raise ValueError(
            f"num_train={num_train} and num_heldout={num_heldout} are more than the {len(questions)} questions that "
            "there are; ask for fewer."
        )
    rng = random.Random(seed)
    rows = [make_row(question, rng) for question in rng.sample(questions, num_train + num_heldout)]
    return DatasetDict(train=Dataset.from_list(rows[:num_train]), test=Dataset.from_list(rows[num_train:]))


def _messages(question: tuple[int, str, int], instruction: str) -> list[dict[str, str]]:
    a, sign, b = question
    # A system message of our own: SmolLM2's template puts a longer one where there is none.
    return [{"role": "system", "content": instruction}, {"role": "user", "content": f"What is {a} {sign} {b}?"}]


def _question_row(question: tuple[int, str, int], rng: random.Random) -> Row:
    a, sign, b = question
    return {"prompt": _messages(question, "Answer with a number."), "answer": str(a + b if sign == "+" else a - b)}


def _pair_row(question: tuple[int, str, int], rng: random.Random) -> Row:
    a, _, b = question
    place = rng.choice(("ones", "tens", "sum"))
    # A sum of ones may be 0: below it no slip would look like one.
    slip = rng.choice([step for step in (-2, -1, 1, 2) if place != "ones" or a % 10 + b % 10 + step >= 0])
    return {
        "prompt": _messages(question, "Show your work."),
        "chosen": [{"role": "assistant", "content": _worked(a, b, {})}],
        "rejected": [{"role": "assistant", "content": _worked(a, b, {place: 10 * slip if place == "tens" else slip})}],
    }


def _worked(a: int, b: int, slips: dict[str, int]) -> str:
    ones = a % 10 + b % 10 + slips.get("ones", 0)
    tens = a - a % 10 + b - b % 10 + slips.get("tens", 0)
    total = tens + ones + slips.get("sum", 0)
    return (
        f"{a % 10} + {b % 10} = {ones}, {a - a % 10} + {b - b % 10} = {tens}, {tens} + {ones} = {total}.\n#### {total}"
    )
