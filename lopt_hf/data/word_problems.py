"""Arithmetic word problems with worked answers, generated: training data that needs no download and no licence.

A story has a theme (what is counted, and the sentences that can be said about it), an opening, up to two events and a
question: one to three operations in all. The arithmetic of the worked answer and its result are computed from the same
numbers that the story tells, so they are right by construction.
"""

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict

__all__ = ["make_word_problems"]

Sentences = dict[str, tuple[str, ...]]

LARGEST = 999  # no quantity in a story exceeds it
STEP = 30  # nor does any change or comparison exceed this

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
SYMBOLS = {"groups": "*", "gain": "+", "loss": "-", "scale": "*", "share": "/", "missing": "-", "difference": "-"}
EVENTS = ("gain", "loss", "scale")
CALCULATING_QUESTIONS = ("share", "missing", "difference")

NAMES = {
    **dict.fromkeys(("Mia", "Lena", "Aisha", "Ines", "Yuki", "Ruth", "Nadia", "Chloe"), "she"),
    **dict.fromkeys(("Omar", "Jonas", "Pavel", "Kofi", "Diego", "Anil", "Tom", "Emil"), "he"),
}
TIMES = {2: "twice", 3: "three times", 4: "four times"}

# {k} is a sentence's number; in `groups` there are {n} groups of {k}, in `scale` {k} is spelt out.
THEMES: tuple[Sentences, ...] = (
    {
        "units": ("apples", "pears", "plums", "lemons", "peaches"),
        "opening": ("{name} has {k} {unit} on a market stall.", "There are {k} {unit} in {name}'s basket."),
        "groups": ("{name} fills {n} crates with {k} {unit} each.", "{name} carries {n} bags of {k} {unit}."),
        "gain": ("{They} picks {k} more.", "{friend} brings {k} more {unit}."),
        "loss": ("{They} sells {k} of them.", "But {k} {unit} turn out to be rotten and are thrown away."),
        "scale": ("After the harvest {name} has {k} as many {unit}.",),
        "share": ("They are packed equally into {k} boxes. How many {unit} go into each box?",),
        "ask": ("How many {unit} does {name} have in the end?", "Count the {unit} that {name} has now."),
    },
    {
        "units": ("stamps", "stickers", "marbles", "shells", "coins"),
        "opening": ("{name} collects {unit} and owns {k} of them.", "In {name}'s album there are {k} {unit}."),
        "groups": ("{name} owns {n} albums with {k} {unit} each.", "{name} buys {n} packs of {k} {unit}."),
        "gain": ("On {name}'s birthday {friend} brings {k} {unit}.", "{They} finds {k} more in a drawer."),
        "loss": ("{They} swaps {k} {unit} for a book.", "While moving house {they} loses {k}."),
        "scale": ("A year later the collection is {k} as big.",),
        "share": ("{name} leaves all {unit} to {k} cousins in equal parts. How many does each cousin get?",),
        "ask": ("How big is {name}'s collection now?", "What is the number of {unit} in the end?"),
    },
    {
        "units": ("dollars", "euros", "francs", "pounds"),
        "opening": ("{name} has saved {k} {unit}.", "There are {k} {unit} in {name}'s piggy bank."),
        "groups": ("{name} works {n} days for {k} {unit} a day.", "For {n} weeks {name} saves {k} {unit} a week."),
        "gain": ("{They} earns another {k} {unit}.", "{friend} pays back {k} {unit}."),
        "loss": ("Then {they} spends {k} {unit} on a ticket.", "A meal costs {name} {k} {unit}."),
        "scale": ("With the prize of a raffle {name} has {k} as much.",),
        "share": ("{name} spends it all on {k} presents of the same price. How many {unit} does one cost?",),
        "ask": ("How many {unit} does {name} have now?", "How much money is that in the end?"),
    },
    {
        "units": ("pages", "chapters", "poems"),
        "opening": ("{name} has read {k} {unit} this month.", "On Monday {name} read {k} {unit}."),
        "groups": ("{name} reads {k} {unit} a day for {n} days.", "{name} reads {n} books, each with {k} {unit}."),
        "gain": ("At the weekend {they} reads {k} more {unit}.", "On the train {name} manages another {k}."),
        "loss": ("But {k} of these {unit} were for school.", "But {k} of them were a second reading."),
        "scale": ("By the end of the year it is {k} as many.",),
        "share": ("{They} read equally many in each of {k} sittings. How many {unit} is that per sitting?",),
        "ask": ("How many new {unit} read for fun is that?", "How many {unit} count for {name}'s book club?"),
    },
    {
        "units": ("passengers", "tourists", "students"),
        "opening": ("A bus sets off with {k} {unit}.", "{name} drives a tram with {k} {unit} on board."),
        "groups": ("A train has {n} cars with {k} {unit} in each.", "A ferry takes on {n} groups of {k} {unit}."),
        "gain": ("At the next stop {k} {unit} get on.", "Another {k} come aboard."),
        "loss": ("In the city {k} {unit} get off.", "Then {k} leave to visit a museum."),
        "scale": ("In the holidays there are {k} as many on board.",),
        "share": ("At the border they change to {k} vans, equally many to each. How many {unit} ride in one van?",),
        "ask": ("How many {unit} are on board now?", "How many {unit} travel on?"),
    },
    {
        "units": ("kilometres", "miles"),
        "opening": ("{name} cycles {k} {unit}.", "{name} has hiked {k} {unit} from the start."),
        "groups": ("{name} rides for {n} hours at {k} {unit} an hour.", "{name} hikes {k} {unit} a day for {n} days."),
        "gain": ("{They} goes on for another {k} {unit}.", "After a rest {they} adds {k} {unit}."),
        "loss": ("Then {they} turns and goes back {k} {unit}.", "To fetch a lost hat {they} returns {k} {unit}."),
        "scale": ("{friend} has gone {k} as far, and {name} catches up.",),
        "share": ("{They} returns to the start in {k} equal stages. How many {unit} long is a stage?",),
        "ask": ("How many {unit} from the start is {name}?", "What is the distance from the start in {unit}?"),
    },
    {
        "units": ("litres", "gallons", "cups"),
        "opening": ("{name}'s tank holds {k} {unit} of water.", "There are {k} {unit} of juice in a barrel."),
        "groups": ("{name} pours {n} buckets of {k} {unit} into a tub.", "Into a barrel go {n} cans of {k} {unit}."),
        "gain": ("The rain adds {k} {unit}.", "{friend} pours in another {k} {unit}."),
        "loss": ("A leak costs {k} {unit}.", "The plants in the garden get {k} {unit} of it."),
        "scale": ("After a storm it is {k} as much.",),
        "share": ("All of it is filled into {k} equal cans. How many {unit} are in one can?",),
        "ask": ("How many {unit} are there now?", "What is left, in {unit}?"),
    },
    {
        "units": ("points", "stars", "tokens"),
        "opening": ("{name} starts the game with {k} {unit}.", "In the first round {name} wins {k} {unit}."),
        "groups": ("{name} wins {n} rounds worth {k} {unit} each.", "In {n} rounds {name} gets {k} {unit} per round."),
        "gain": ("A bonus brings {k} more {unit}.", "{They} beats {friend} and gains {k}."),
        "loss": ("A mistake costs {k} {unit}.", "Then {friend} takes {k} {unit} away."),
        "scale": ("A lucky card makes it {k} as many.",),
        "share": ("The {unit} are divided equally among {k} team mates. How many {unit} does each one get?",),
        "ask": ("How many {unit} does {name} end up with?", "What does the scoreboard show for {name} in {unit}?"),
    },
)

# Questions that compare the final quantity with another number: they fit every theme.
COMPARISONS: Sentences = {
    "missing": ("The goal is {k} {unit}. How many {unit} are missing?", "How many more make it {k} {unit}?"),
    "difference": ("A year ago it was {k} {unit}. How many more is it now?", "By how many is that above {k} {unit}?"),
}

# The worked answer states each operation in one sentence; {sum} is the arithmetic.
WORKING: Sentences = {
    "groups": ("{n} times {k} makes {sum} {unit}.", "At first that is {sum} {unit}."),
    "gain": ("With {k} more it is {sum} {unit}.", "Adding {k} gives {sum} {unit}."),
    "loss": ("Without those {k} it is {sum} {unit}.", "Taking away {k} leaves {sum} {unit}."),
    "scale": ("{times} as many is {sum} {unit}.", "Multiplying by {k} gives {sum} {unit}."),
    "share": ("Each part is {sum} {unit}.", "Divided by {k} that is {sum} {unit}."),
    "missing": ("To reach {k} it takes {sum} {unit}.", "The missing part is {sum} {unit}."),
    "difference": ("The difference to {k} is {sum} {unit}.", "Compared with {k} it is {sum} {unit} more."),
}


def make_word_problems(num_train: int, num_heldout: int, seed: int) -> DatasetDict:
    """Generates word problems with worked answers, different ones for training and for the held-out test.

    Args:
        num_train: Number of problems in the split `"train"`.
        num_heldout: Number of problems in the split `"test"`. No problem's text occurs twice, within a split or across
            them; its form (the text without names and numbers) may.
        seed: The same seed gives the same problems.

    Returns:
        Rows of `prompt` (a list with one user message), `completion` (a list with one assistant message: one to three
        sentences with the arithmetic spelt out, and a last line `#### N` as in GSM8K) and `answer` (N as a string; N
        is an integer from 2 to 999).

    Raises:
        ValueError: If one of the two numbers is less than 1.
    """
    if num_train < 1 or num_heldout < 1:
        raise ValueError(f"num_train={num_train} and num_heldout={num_heldout} must both be at least 1.")
    rng = random.Random(seed)
    problems: dict[str, _Story] = {}
    while len(problems) < num_train + num_heldout:
        story = _write_story(rng)
        problems.setdefault(" ".join(story.text), story)
    rows = [_to_row(problem, story) for problem, story in problems.items()]
    return DatasetDict(train=Dataset.from_list(rows[:num_train]), test=Dataset.from_list(rows[num_train:]))


@dataclass
class _Story:
    """A problem in the making: what has been told, how it is worked out, and the quantity reached so far."""

    rng: random.Random
    words: dict[str, str]
    total: int = 0
    text: list[str] = field(default_factory=list)
    working: list[str] = field(default_factory=list)

    def tell(self, sentence: str, **numbers: object) -> None:
        self.text.append(sentence.format(**self.words, **numbers))

    def work_out(self, kind: str, left: int, right: int, **numbers: object) -> None:
        self.total = OPERATORS[SYMBOLS[kind]](left, right)
        calculation = f"{left} {SYMBOLS[kind]} {right} = {self.total}"
        self.working.append(self.rng.choice(WORKING[kind]).format(**self.words, **numbers, sum=calculation))

    def open(self, theme: Sentences) -> None:
        if self.rng.random() < 0.5:
            self.total = self.rng.randint(5, 60)
            self.tell(self.rng.choice(theme["opening"]), k=self.total)
        else:
            count, size = self.rng.randint(2, 9), self.rng.randint(2, 12)
            self.tell(self.rng.choice(theme["groups"]), n=count, k=size)
            self.work_out("groups", count, size, n=count, k=size)

    def go_on(self, kind: str, sentence: str) -> None:
        """Tells an event, or asks a question, of this kind with a number that suits the quantity reached."""
        number = self.rng.choice(_suitable_numbers(kind, self.total))
        times = TIMES.get(number, "")
        self.tell(sentence, k=times if kind == "scale" else number)
        left, right = (number, self.total) if kind == "missing" else (self.total, number)
        self.work_out(kind, left, right, k=number, times=times.capitalize())


def _suitable_numbers(kind: str, total: int) -> Sequence[int]:
    """The numbers which lead from `total` to an integer between 2 and `LARGEST` by an operation of this kind."""
    suitable: dict[str, Sequence[int]] = {
        "gain": range(2, min(STEP, LARGEST - total) + 1),
        "loss": range(2, min(STEP, total - 2) + 1),
        "scale": [number for number in TIMES if total * number <= LARGEST],
        "share": [number for number in range(2, 10) if total % number == 0 and total > number],
        "missing": range(total + 2, min(total + STEP, LARGEST) + 1),
        "difference": range(max(2, total - STEP), total - 1),
    }
    return suitable[kind]


def _write_story(rng: random.Random) -> _Story:
    theme = rng.choice(THEMES)
    name, friend = rng.sample(list(NAMES), 2)
    words = {"name": name, "friend": friend, "they": NAMES[name], "They": NAMES[name].capitalize()}
    story = _Story(rng, words | {"unit": rng.choice(theme["units"])})
    story.open(theme)
    events = [(kind, sentence) for kind in EVENTS for sentence in theme[kind]]
    for kind, sentence in rng.sample(events, rng.randint(0, 2)):
        if _suitable_numbers(kind, story.total):
            story.go_on(kind, sentence)
    _ask(story, {**theme, **COMPARISONS})
    return story


def _ask(story: _Story, sentences: Sentences) -> None:
    """Ends the story with a question such that one to three operations answer it."""
    if len(story.working) == 3 or (story.working and story.rng.random() < 0.4):
        story.tell(story.rng.choice(sentences["ask"]))
    else:
        kind = story.rng.choice([kind for kind in CALCULATING_QUESTIONS if _suitable_numbers(kind, story.total)])
        story.go_on(kind, story.rng.choice(sentences[kind]))


def _to_row(problem: str, story: _Story) -> dict[str, object]:
    solution = f"{' '.join(story.working)}\n#### {story.total}"
    return {
        "prompt": [{"role": "user", "content": problem}],
        "completion": [{"role": "assistant", "content": solution}],
        "answer": str(story.total),
    }
