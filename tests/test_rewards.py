"""Right answers in any usual writing are right; what only looks like them is not."""

import json
from fractions import Fraction

import pytest

from lopt_hf.rewards import boxed_answer, boxed_reward, gsm8k_reward, last_number, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", 42),
        ("2 + 2 = 4\n#### 4\n", 4),
        ("#### 1,234", 1234),
        ("#### 1,234,567.50", Fraction("1234567.5")),
        ("#### -3", -3),
        ("#### \u22123", -3),  # the minus sign of typography
        ("#### +3", 3),
        ("#### $1,000.", 1000),
        ("#### -$5.25 in all", Fraction("-5.25")),
        ("#### .5", Fraction(1, 2)),
        ("#### 3/4", Fraction(3, 4)),
        ("#### 6 / 8", Fraction(3, 4)),
        ("#### 18 apples, not 20", 18),
        ("#### 1 and then #### 2", 2),
        ("We get 7. The answer is 12.", 12),
        ("5-3=2", 2),
        ("it takes 10 - 3", 3),
        ("it takes 10-3", 3),
        ("it takes (2+5)-3", 3),
        ("5 - -3", -3),
        ("from 5 to -3", -3),
        ("it is 1,2 or 3", 3),
        ("it is 3 or 1,2", 2),
        ("it is 0.1", Fraction(1, 10)),
        ("10,000", 10000),
        ("room 3b has 4", 4),
        ("1e-05", Fraction(1, 100000)),  # how a float is written
        ("1e+23", 10**23),
        ("#### 2 1/2", Fraction(5, 2)),
        ("it takes -2 1/2 hours", Fraction(-5, 2)),
        ("5 10 1/2", Fraction(21, 2)),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("text", ["", "no number", "42 ####", "42 #### none", "#### 1/0", "####"])
def test_no_last_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("42.0", 42),
        ("-0.50", Fraction(-1, 2)),
        ("1,234", 1234),
        ("1{,}234", 1234),
        (r"1\,234", 1234),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\frac34", Fraction(3, 4)),
        ("3/4", Fraction(3, 4)),
        (r"$12$", 12),
        (r"12\text{ cm}", 12),
        (r"50\%", 50),
        (r"\left 7 \right", 7),
        (r"\$18.00", 18),
        (r"-\$3", -3),
        (r"\$32,\!348", 32348),
        (r"\$ 5\text{ each}.", 5),
        (r"\frac 3 4", Fraction(3, 4)),
        ("2 1/2", Fraction(5, 2)),
        ("1e3", 1000),
    ],
)
def test_parse_number(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "x+1",
        "1 or 2",
        "1,2",
        r"\frac{1}{0}",
        r"\frac{x}{2}",
        r"2\pi",
        "1.2.3",
        "3!",
        "1 2",
        "1, 234",
        r"3\text{ or }4",
        r"3\text{ or }1/2",
        r"1\;2",
    ],
)
def test_what_is_more_than_a_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 7", "7"),
        (r"\fbox{9}", "9"),
        (r"\boxed{ 3 }", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed", None),
        ("5", None),
    ],
)
def test_boxed_answer(text, boxed):
    assert boxed_answer(text) == boxed


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("I think #### 18", "reason 3 * 6 = 18\n#### 18", 1.0),
        ("it is 18.00", "#### 18", 1.0),
        ("#### 1,800", "1800", 1.0),
        ("#### 18 #### 19", "#### 18", 0.0),  # the last counts
        ("18 19 20 21", "#### 18", 0.0),  # a list is no answer
        ("the answer is 118", "#### 18", 0.0),
        ("-18", "#### 18", 0.0),
        ("1.8", "#### 18", 0.0),
        ("", "#### 18", 0.0),
        ("#### eighteen, i.e. 6 * 3", "#### 18", 0.0),
        ("18 ####", "#### 18", 0.0),
        ("18", "no number", None),
    ],
)
def test_gsm8k_reward(completion, answer, reward):
    assert gsm8k_reward([completion], answer=[answer], prompts=["?"]) == [reward]
    assert gsm8k_reward([[{"role": "assistant", "content": completion}]], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (r"\boxed{0.75}", r"hence \boxed{\frac{3}{4}}", 1.0),
        (r"\boxed{1,234}", r"\boxed{1234}", 1.0),
        (r"\boxed{x + 1}", r"\boxed{x+1}", 1.0),
        (r"\boxed{\$18}", r"\boxed{18}", 1.0),
        (r"\boxed{18}", r"\boxed{\$18.00}", 1.0),
        (r"\boxed{3\text{ or }4}", r"\boxed{34}", 0.0),
        (r"\boxed{12}", r"\boxed{1 2}", 0.0),
        (r"\boxed{\text{Monday}}", r"\boxed{Monday}", 1.0),
        (r"\boxed{\text{Monday}}", r"\boxed{\text{Tuesday}}", 0.0),
        (r"\boxed{3}", "3", None),  # a proof, say
        (r"\boxed{3}", r"\boxed{}", None),
        ("3", r"\boxed{3}", 0.0),  # asked for a box
        (r"\boxed{3", r"\boxed{3}", 0.0),  # cut off
        (r"\boxed{3}, no, \boxed{4}", r"\boxed{3}", 0.0),
        (r"\boxed{}", r"\boxed{3}", 0.0),
        (r"\boxed{3 or 4}", r"\boxed{3}", 0.0),
        (r"\boxed{-3}", r"\boxed{3}", 0.0),
        (r"\boxed{X}", r"\boxed{x}", 0.0),  # another variable
    ],
)
def test_boxed_reward(completion, solution, reward):
    assert boxed_reward([completion], solution=[solution]) == [reward]


def test_a_number_without_end_is_wrong():
    """Python raises where a number has 4,300 digits."""
    for text in ("9" * 5000, "1/" + "3" * 5000, "1," + "000," * 2000 + "000"):
        assert gsm8k_reward([f"#### {text}"], answer=["1"]) == [0.0]
        assert boxed_reward([rf"\boxed{{{text}}}"], solution=[r"\boxed{1}"]) == [0.0]


def test_an_empty_conversation_is_wrong():
    assert gsm8k_reward([[]], answer=["1"]) == [0.0]
    assert gsm8k_reward([[{"role": "assistant", "content": None}]], answer=["1"]) == [0.0]


def test_gsm8ks_own_answers_are_right_and_their_neighbours_wrong(shared):
    """All 7,473 training answers: each solves its own problem, none the next one unless the number is the same."""
    rows = [json.loads(line) for line in (shared / "data/gsm8k_train.jsonl").open(encoding="utf-8")]
    answers = [row["answer"] for row in rows]
    assert set(gsm8k_reward(answers, answer=answers)) == {1.0}
    numbers = [answer.rpartition("#### ")[2].replace(",", "") for answer in answers]
    shifted = answers[1:] + answers[:1]
    expected = [float(a == b) for a, b in zip(numbers[1:] + numbers[:1], numbers, strict=True)]
    assert gsm8k_reward(shifted, answer=answers) == expected


@pytest.mark.parametrize("form", [r"{}", r"{}.0", r"${}$", r"\frac{{{}}}{{1}}", r"{}\text{{ m}}"])
def test_agrees_with_math_verify(form):
    """On writings of whole numbers; `math-verify` also knows formulas."""
    pytest.importorskip("math_verify", reason="needs math-verify: the extra `math`")
    from trl.rewards import accuracy_reward

    for number in (0, 7, -12, 1500):
        completions = [
            [{"role": "assistant", "content": rf"\boxed{{{form.format(n)}}}"}] for n in (number, number + 1)
        ]
        solutions = [rf"\boxed{{{number}}}"] * 2
        assert accuracy_reward(completions, solutions) == boxed_reward(completions, solutions) == [1.0, 0.0]
