"""The questions and the prose of the `offline` tasks: sound data, and lm-eval can run it."""

import operator
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy.stats import binomtest

from lopt_hf.common.evaluation import general_text
from lopt_hf.data.pretrained import SMOLLM2_ID, resolve_model
from lopt_hf.retention import own_code
from lopt_hf.retention.evaluation_settings import EvaluationSettings
from lopt_hf.retention.identity import task_identity
from lopt_hf.retention.suites import SuiteTask, load_entries
from lopt_hf.retention.tasks import load
from tests.tiny import make_model, make_tokenizer

TASKS = Path(load.__file__).parent
LEAST_QUESTIONS = {load.knowledge: 300, load.language: 200}
NUM_CHOICES = 4
CHANCE = 1 / NUM_CHOICES

OPERATORS = {"times": operator.mul, "plus": operator.add, "minus": operator.sub, "divided by": operator.floordiv}
CALCULATION = re.compile(rf"What is (\d+) ({'|'.join(OPERATORS)}) (\d+)\?")

FUNCTION_WORDS = frozenset(
    "all and are can did does each for from had has have how into its not that the their them these they this those "
    "was were what when where which who whom whose why will with you your".split()
)
# Questions of which only the right answer may repeat a word, and why
FAIR = {
    'What is the plural of "sheep"?': "that it is the same word is what is asked, and the distractors begin with it"
}


@pytest.fixture(params=LEAST_QUESTIONS, ids=lambda loader: loader.__name__)
def loader(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def questions(loader: Any) -> list[dict[str, Any]]:
    return loader()["test"].to_list()


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())


def _content_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{3,}", text.lower())) - FUNCTION_WORDS


def _have_same_stem(one: str, other: str) -> bool:
    """Whether words begin with the same four letters, or one is in the other, as "land" in "island"."""
    return min(len(one), len(other)) >= 4 and (one[:4] == other[:4] or one in other or other in one)


def _repeated_by_the_key_alone(row: dict[str, Any]) -> set[str]:
    """What the question and the right answer share, and no distractor: a word, one of the same stem, or all of it."""
    question = _normalised(row["question"])
    choices = [_normalised(choice) for choice in row["choices"]]
    key = row["answer"]
    shared = {
        word
        for word in _content_words(question)
        for is_same in (operator.eq, _have_same_stem)
        if [i for i, text in enumerate(choices) if any(is_same(word, own) for own in _content_words(text))] == [key]
    }
    if [i for i, text in enumerate(choices) if re.search(rf"\b{re.escape(text)}\b", question)] == [key]:
        shared.add(choices[key])
    return shared


def _run(lm: HFLM, **arguments: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=TASKS, include_defaults=False)
    return simple_evaluate(model=lm, tasks=["offline"], task_manager=manager, bootstrap_iters=0, **arguments)


def test_there_are_enough_questions_and_none_twice(loader: Any, questions: list[dict[str, Any]]) -> None:
    asked = Counter(_normalised(row["question"]) for row in questions)
    assert [question for question, times in asked.items() if times > 1] == []
    assert len(asked) >= LEAST_QUESTIONS[loader]


def test_choices_are_four_different_ones(questions: list[dict[str, Any]]) -> None:
    for row in questions:
        assert set(row) == {"question", "choices", "answer", "topic"}
        assert all(text == text.strip() != "" for text in (row["question"], row["topic"], *row["choices"]))
        assert len({_normalised(choice) for choice in row["choices"]}) == len(row["choices"]) == NUM_CHOICES, row
        assert row["answer"] in range(NUM_CHOICES), row


def test_every_topic_has_several_questions(questions: list[dict[str, Any]]) -> None:
    assert min(Counter(row["topic"] for row in questions).values()) >= 20


def test_position_does_not_give_the_answer_away(questions: list[dict[str, Any]]) -> None:
    positions = Counter(row["answer"] for row in questions)
    assert len(positions) == NUM_CHOICES
    assert max(positions.values()) - min(positions.values()) <= 1


def test_length_does_not_give_the_answer_away(questions: list[dict[str, Any]]) -> None:
    def is_longest(row: dict[str, Any]) -> bool:
        others = [len(choice) for i, choice in enumerate(row["choices"]) if i != row["answer"]]
        return len(row["choices"][row["answer"]]) > max(others)

    assert 0.15 <= sum(map(is_longest, questions)) / len(questions) <= 0.40


@pytest.mark.parametrize(
    ("question", "choice"),
    [
        ("Where is the Silk Road?", "silk"),  # the whole choice
        ("What follows 2?", "2"),
        ("What is the web?", "World Wide Web"),  # one of its words
        ("Who makes peace among nations?", "the United Nations"),
        ("What helps to pull?", "a pulley"),  # with the same stem
        ("Where do airplanes land?", "at an airport"),
        ("What is low land?", "an island"),  # in a compound
        ("What do you call your mother's mother?", "your grandmother"),
    ],
)
def test_a_word_that_only_the_right_answer_repeats_is_found(question: str, choice: str) -> None:
    row = {"question": question, "choices": ["a goat", choice, "a tailor", "a trumpet"], "answer": 1}
    assert _repeated_by_the_key_alone(row)
    assert not _repeated_by_the_key_alone(row | {"answer": 0})
    assert not _repeated_by_the_key_alone(row | {"choices": ["a goat", choice, choice, "a tailor"]})


def test_the_question_does_not_contain_only_the_right_answer(questions: list[dict[str, Any]]) -> None:
    given_away = {row["question"]: _repeated_by_the_key_alone(row) for row in questions}
    assert {question: words for question, words in given_away.items() if words and question not in FAIR} == {}


def test_calculations_have_the_right_key() -> None:
    checked = 0
    for row in load.knowledge()["test"]:
        if found := CALCULATION.fullmatch(row["question"]):
            left, operation, right = found.groups()
            expected = OPERATORS[operation](int(left), int(right))
            assert [i for i, choice in enumerate(row["choices"]) if int(choice) == expected] == [row["answer"]], row
            checked += 1
    assert checked >= 5


def test_the_first_questions_are_of_many_topics(questions: list[dict[str, Any]]) -> None:
    """lm-eval's `limit` takes the first."""
    topics = {row["topic"] for row in questions}
    assert len({row["topic"] for row in questions[:50]}) >= 0.75 * len(topics)


def test_order_is_the_same_at_every_load(loader: Any, questions: list[dict[str, Any]]) -> None:
    assert loader()["test"].to_list() == questions


def test_prose_is_deterministic_and_of_even_length() -> None:
    documents = load.prose()["test"]["text"]
    assert list(documents) == load.prose_documents(general_text())
    assert len(set(documents)) == len(documents) >= 40
    longest = load.MIN_DOCUMENT + load.MAX_PARAGRAPH
    assert all(load.MIN_DOCUMENT <= len(document) <= longest for document in documents)


def test_prose_leaves_out_what_is_no_prose() -> None:
    sentence = (
        "The value of an expression is that of its parts, put together in the order in which they are writ-\nten. "
    )
    prose = (sentence * 8).strip()
    other = [
        "   " + prose,  # indented
        "* " + prose,  # a list
        prose.removesuffix("."),  # leads up to something
        "f(x)[0] = {1: 2}; " * 20 + "is an assignment.",  # code
        prose,  # again
        "Short.",
    ]
    text = "\n\n".join([prose, *other, "A" + prose])
    unwrapped = " ".join(prose.replace("writ-\nten", "writ-ten").split())
    assert load.prose_documents(text) == [f"{unwrapped}\nA{unwrapped}"]


def test_lm_eval_runs_the_suite() -> None:
    lm = HFLM(pretrained=make_model(), tokenizer=make_tokenizer(), batch_size=8, device="cpu", max_length=128)
    results = _run(lm, limit=2)["results"]
    parts = ("knowledge", "language", "numbers", "words", "code", "world")
    accuracies = [results[f"offline_{part}"]["acc,none"] for part in parts]
    assert all("acc_norm,none" in results[f"offline_{part}"] for part in parts)
    assert results["offline_questions"]["acc,none"] == pytest.approx(sum(accuracies) / len(parts))
    assert results["offline_prose"]["bits_per_byte,none"] > 0
    assert results["offline_prose"]["word_perplexity,none"] > results["offline_prose"]["byte_perplexity,none"] > 1


def test_scores_do_not_depend_on_where_the_package_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept by what is asked, so that another clone finds them."""
    copied = shutil.copytree(TASKS, tmp_path / "tasks")
    monkeypatch.setattr(own_code, "LIBRARIES", (*own_code.LIBRARIES, tmp_path))  # as the other clone's own place is
    wanted, settings = [SuiteTask("offline_code"), SuiteTask("offline_knowledge")], EvaluationSettings(limit=3)
    for one, other in zip(load_entries(wanted), load_entries(wanted, [copied]), strict=True):
        configurations = [task.dump_config()["metadata"]["config_source"] for task in (one.tasks[0], other.tasks[0])]
        assert configurations[0] != configurations[1]
        assert task_identity(one.tasks[0], None, settings) == task_identity(other.tasks[0], None, settings)


@pytest.mark.slow
def test_smollm2_is_clearly_above_chance() -> None:
    lm = HFLM(pretrained=resolve_model(SMOLLM2_ID), dtype="bfloat16", batch_size=16, device="cpu")
    evaluation = _run(lm)
    for task in ("offline_knowledge", "offline_language"):
        right = [bool(sample["acc"]) for sample in evaluation["samples"][task]]
        assert binomtest(sum(right), len(right)).proportion_ci(confidence_level=0.99).low > CHANCE, task
    assert 0 < evaluation["results"]["offline_prose"]["bits_per_byte,none"] < 2
