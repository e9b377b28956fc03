"""The files of questions are those that the scripts write, and nothing but knowing the answer helps to guess it."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import pytest

from lopt_hf.retention.questions.make import AREAS, FOLDER, make
from lopt_hf.retention.questions.question import Question, arrange, draw, near, wrong_answers
from lopt_hf.retention.tasks import load

LOADERS = {"numbers": load.numbers, "words": load.words, "code": load.code, "world": load.world}
# A wrong spelling is wrong whenever it is shown, so that having seen it helps
GIVEN_BY_EXPERIENCE = "spelling"


def rows_of(area: str) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (FOLDER / f"offline_{area}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ]


@pytest.fixture(params=AREAS)
def area(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def rows(area: str) -> list[dict[str, Any]]:
    return rows_of(area)


def normalised(text: str) -> str:
    return " ".join(text.lower().split())


def test_files_are_what_the_scripts_write(area: str) -> None:
    assert make(area) == (FOLDER / f"offline_{area}.jsonl").read_text(encoding="utf-8")


def test_the_tasks_load_them_in_their_order(area: str, rows: list[dict[str, Any]]) -> None:
    assert LOADERS[area]()["test"].to_list() == rows


def test_there_are_enough_and_none_twice() -> None:
    made = [row["question"] for area in AREAS for row in rows_of(area)]
    by_hand = [row["question"] for loader in (load.knowledge, load.language) for row in loader()["test"]]
    counts = Counter(map(normalised, [*made, *by_hand]))
    assert [text for text, times in counts.items() if times > 1] == []
    assert len(made) >= 3000


def test_rows_are_sound(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert list(row) == ["question", "choices", "answer", "topic", "difficulty", "cluster"]
        assert len(set(row["choices"])) == 4, row
        assert all(choice == choice.strip() != "" for choice in row["choices"]), row
        assert row["answer"] in range(4) and row["difficulty"] in range(1, 6), row


def test_every_topic_is_graded(rows: list[dict[str, Any]]) -> None:
    levels = defaultdict(set)
    for row in rows:
        levels[row["topic"]].add(row["difficulty"])
    assert {topic: found for topic, found in levels.items() if len(found) < 4} == (
        {"leap year": {3, 4}, "time zone": {4, 5}} if "leap year" in levels else {}
    )


def test_position_does_not_give_the_answer_away(rows: list[dict[str, Any]]) -> None:
    assert_even(row["answer"] for row in rows)
    for topic in {row["topic"] for row in rows}:
        places = Counter(row["answer"] for row in rows if row["topic"] == topic)
        assert max(places.values()) - min(places[place] for place in range(4)) <= 2, topic


def assert_even(places: Iterable[int]) -> None:
    counts = Counter(places)
    assert len(counts) == 4
    assert max(counts.values()) - min(counts.values()) <= 1


def share_right(rows: Sequence[dict[str, Any]], score: Callable[[str], float]) -> float:
    """How often the choice with the highest score is right; of several with the same one, one is picked at random."""
    right = 0.0
    for row in rows:
        scores = [score(choice) for choice in row["choices"]]
        best = [place for place, value in enumerate(scores) if value == max(scores)]
        right += (row["answer"] in best) / len(best)
    return right / len(rows)


def by_topic(rows: list[dict[str, Any]], least: int = 50) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        found[row["topic"]].append(row)
    return {topic: members for topic, members in found.items() if len(members) >= least}


@pytest.mark.parametrize("sign", [1, -1], ids=["longest", "shortest"])
def test_length_does_not_give_the_answer_away(rows: list[dict[str, Any]], sign: int) -> None:
    assert 0.20 <= share_right(rows, lambda choice: sign * len(choice)) <= 0.29
    for topic, members in by_topic(rows).items():
        assert 0.05 <= share_right(members, lambda choice: sign * len(choice)) <= 0.40, topic


def test_the_middle_of_four_numbers_is_not_more_often_right(rows: list[dict[str, Any]]) -> None:
    numeric = [row for row in rows if all(choice.lstrip("-").isdigit() for choice in row["choices"])]
    for place in range(4):
        ranks = [sorted(map(int, row["choices"])).index(int(row["choices"][row["answer"]])) for row in numeric]
        assert not ranks or 0.15 <= ranks.count(place) / len(ranks) <= 0.35, place


def test_what_was_right_elsewhere_does_not_help(rows: list[dict[str, Any]]) -> None:
    """A guess by how often each choice is right in the other questions of its topic."""
    rows = [row for row in rows if row["topic"] != GIVEN_BY_EXPERIENCE]
    guessed = 0.0
    for members in by_topic(rows, 1).values():
        shown = Counter(choice for row in members for choice in row["choices"])
        keys = Counter(row["choices"][row["answer"]] for row in members)
        for row in members:
            key = row["choices"][row["answer"]]
            odds = [(keys[choice] - (choice == key) + 0.5) / (shown[choice] - 1 + 2) for choice in row["choices"]]
            best = [place for place, value in enumerate(odds) if value == max(odds)]
            guessed += (row["answer"] in best) / len(best)
    assert guessed / len(rows) <= 0.34


@pytest.mark.parametrize("number", [50, 100, 250])
def test_the_first_rows_are_a_stratified_sample(rows: list[dict[str, Any]], number: int) -> None:
    """lm-eval's `limit` takes the first: of each topic and each difficulty about as large a share as of all."""
    for field in ("topic", "difficulty"):
        counts = Counter(row[field] for row in rows)
        first = Counter(row[field] for row in rows[:number])
        for value, count in counts.items():
            assert abs(first[value] - count * number / len(rows)) <= 4, (field, value)


def test_clusters_are_many_and_shared(rows: list[dict[str, Any]]) -> None:
    counts = Counter(row["cluster"] for row in rows)
    assert 50 <= len(counts) < len(rows)
    assert max(counts.values()) <= 0.05 * len(rows)


def test_wrong_numbers_lie_on_both_sides() -> None:
    random, ranks = Random(0), Counter[int]()
    for _ in range(400):
        wrong = [int(text) for text in near(random, 50, [1, 2, 10])]
        assert len(set(wrong)) == 3 and 50 not in wrong
        ranks[sum(number < 50 for number in wrong)] += 1
    assert min(ranks[rank] for rank in range(4)) > 70
    assert all(int(text) >= 0 for answer in range(4) for text in near(random, answer, [1, 2, 3]))


def test_wrong_numbers_have_as_many_digits_where_there_are_some() -> None:
    """As a model finds the shorter of two numbers likelier, whatever is asked."""
    random = Random(0)
    for answer, steps in ((50, [1, 2, 3, 10, 100]), (11, [1, 2, 3, 5, 10, 100]), (480, [1, 2, 3, 20, 1000])):
        lengths = {len(text) for _ in range(100) for text in near(random, answer, steps, least=1)}
        assert lengths == {len(str(answer))} or answer == 11  # below it there is one of two digits
        numbers = [int(text) for _ in range(100) for text in near(random, answer, steps, least=1)]
        assert max(numbers) < 10 ** len(str(answer))


def test_wrong_answers_are_longer_as_often_as_shorter() -> None:
    random, longer = Random(0), 0
    for _ in range(300):
        wrong = wrong_answers(random, "four", ["a", "bb", "ccc", "four", "ddddd", "eeeeee", "fffffff"])
        longer += sum(len(text) > 4 for text in wrong)
    assert 0.42 <= longer / 900 <= 0.58
    with pytest.raises(ValueError, match="'a' has only 2 wrong answers; it needs 3"):
        wrong_answers(random, "a", ["a", "b", "b", "c"])


def question(text: str = "Which?", wrong: tuple[str, ...] = ("b", "c", "d"), level: int = 1) -> Question:
    return Question(text, "a", wrong, "letters", level, "letters")


@pytest.mark.parametrize("given", [{"wrong": ("a", "b", "c")}, {"wrong": ("b", "c")}, {"level": 6}])
def test_an_unsound_question(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no four different choices, or no level"):
        question(**given)


def test_questions_asked_twice_and_too_few() -> None:
    with pytest.raises(ValueError, match="asked more than once.*which"):
        arrange([question(), question("which?")], Random(0))
    with pytest.raises(RuntimeError, match="fewer than 2 different questions of"):
        draw(Random(0), lambda random, level: question(level=level), 2)
