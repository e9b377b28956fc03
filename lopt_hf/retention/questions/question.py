"""A question with four choices, and what all kinds of questions have in common: drawing, wrong answers, order."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

__all__ = ["LEVELS", "NUM_WRONG", "Question", "arrange", "draw", "near", "wrong_answers"]

LEVELS = (1, 2, 3, 4, 5)
NUM_WRONG = 3
MOST_TRIES = 400  # for each question wanted, before a kind is said to have too few


@dataclass(frozen=True)
class Question:
    """A question with one right answer.

    Parameters:
        text: What is asked.
        answer: The right answer.
        wrong: Three that are not.
        topic: The kind of question.
        level: 1, what a model of 135 million parameters often knows, to 5, what one of 7 billion often does not.
        cluster: What it shares with others, such as a pattern or a country: their answers are no independent samples.
    """

    text: str
    answer: str
    wrong: tuple[str, ...]
    topic: str
    level: int
    cluster: str

    def __post_init__(self) -> None:
        choices = {self.answer, *self.wrong}
        if len(choices) != NUM_WRONG + 1 or len(self.wrong) != NUM_WRONG or self.level not in LEVELS:
            raise ValueError(f"{self} has no four different choices, or no level from 1 to 5.")


Maker = Callable[[Random, int], Question | None]


def draw(random: Random, maker: Maker, number: int, levels: Iterable[int] = LEVELS) -> list[Question]:
    """Draws questions of one kind, no text twice.

    Args:
        random: Where numbers and words come from.
        maker: Makes a question of a level; `None` where the numbers drawn give none.
        number: How many for each level.
        levels: The levels.

    Raises:
        RuntimeError: If there are too few different questions.
    """
    found: dict[str, Question] = {}
    for level in levels:
        for _ in range(number * MOST_TRIES):
            if sum(question.level == level for question in found.values()) == number:
                break
            question = maker(random, level)
            if question is not None:
                found.setdefault(_normalised(question.text), question)
        else:
            raise RuntimeError(f"there are fewer than {number} different questions of {maker.__name__}({level}).")
    return list(found.values())


def near(random: Random, answer: int, steps: Iterable[int], least: int = 0) -> tuple[str, ...]:
    """Draws three wrong numbers near the right one, which is the least, the greatest or between with equal chance.

    They have as many digits as it has, where there are enough of these: a model finds a shorter number likelier.

    Args:
        random: Where they come from.
        answer: The right number.
        steps: How far wrong ones are from it; both ways.
        least: No number is below it.
    """
    sizes = {abs(step) for step in steps} - {0}
    for step in range(1, 2 * NUM_WRONG):  # where too few steps lead down to what is not below the least
        if len([size for size in sizes if answer - size >= least]) >= NUM_WRONG or answer - step < least:
            break
        sizes.add(step)
    below = sorted(answer - size for size in sizes if answer - size >= least)
    above = sorted(answer + size for size in sizes)
    num_below = min(random.randint(0, NUM_WRONG), len(below))
    chosen = [
        *_of_a_length(random, below, len(str(answer)))[:num_below],
        *_of_a_length(random, above, len(str(answer)))[: NUM_WRONG - num_below],
    ]
    return tuple(str(number) for number in chosen)


def _of_a_length(random: Random, numbers: Sequence[int], length: int) -> list[int]:
    """Shuffles numbers, those with so many characters first."""
    shuffled = random.sample(numbers, len(numbers))
    return sorted(shuffled, key=lambda number: len(str(number)) != length)


def wrong_answers(random: Random, answer: str, candidates: Iterable[str]) -> tuple[str, ...]:
    """Draws three wrong answers, so that the right one is the longest or the shortest no more often than they are.

    Args:
        random: Where they come from.
        answer: The right answer.
        candidates: Wrong ones; what equals the answer or another one is left out.

    Raises:
        ValueError: If there are fewer than three.
    """
    pool = [candidate for candidate in dict.fromkeys(candidates) if candidate != answer]
    if len(pool) < NUM_WRONG:
        raise ValueError(f"{answer!r} has only {len(pool)} wrong answers; it needs {NUM_WRONG}.")
    random.shuffle(pool)
    longer = [text for text in pool if len(text) > len(answer)]
    shorter = [text for text in pool if len(text) < len(answer)]
    same = [text for text in pool if len(text) == len(answer)]
    most = min(len(longer), len(shorter), NUM_WRONG)  # of each, if those of the same length are enough for the rest
    rank = random.randint(0, NUM_WRONG)
    chosen = [*longer[: min(rank, most)], *shorter[: min(NUM_WRONG - rank, most)]]
    rest = [text for text in (*same, *longer, *shorter) if text not in chosen]
    return tuple([*chosen, *rest][:NUM_WRONG])


def arrange(questions: Sequence[Question], random: Random) -> list[dict[str, Any]]:
    """Puts questions in their order and the choices in theirs.

    The right answer stands equally often at each place, in each topic too. The first of the rows, however many, have
    about the same shares of topics and levels as all of them, so that a part of them is a stratified sample.

    Raises:
        ValueError: If a question is there twice.
    """
    counts = Counter(_normalised(question.text) for question in questions)
    twice = [text for text, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"asked more than once: {twice}")
    strata: dict[tuple[str, int], list[Question]] = defaultdict(list)
    for question in questions:
        strata[question.topic, question.level].append(question)
    placed: list[tuple[float, Question]] = []
    for _, members in sorted(strata.items()):
        random.shuffle(members)
        placed += [((number + random.random()) / len(members), one) for number, one in enumerate(members)]
    ordered = [question for _, question in sorted(placed, key=lambda pair: pair[0])]
    by_topic = sorted(range(len(ordered)), key=lambda number: ordered[number].topic)
    places: dict[int, int] = {}
    for start in range(0, len(by_topic), NUM_WRONG + 1):
        block = list(range(NUM_WRONG + 1))
        random.shuffle(block)
        places.update(zip(by_topic[start : start + NUM_WRONG + 1], block, strict=False))
    return [_row(question, places[number], random) for number, question in enumerate(ordered)]


def _row(question: Question, place: int, random: Random) -> dict[str, Any]:
    choices = list(question.wrong)
    random.shuffle(choices)
    choices.insert(place, question.answer)
    labels = {"topic": question.topic, "difficulty": question.level, "cluster": question.cluster}
    return {"question": question.text, "choices": choices, "answer": place, **labels}


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())
