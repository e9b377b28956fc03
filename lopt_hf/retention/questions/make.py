"""Writes the questions of the suite `offline` that are made by rule, the same ones at every run.

`python -m lopt_hf.retention.questions.make` writes `offline_numbers.jsonl`, `offline_words.jsonl`,
`offline_code.jsonl` and `offline_world.jsonl`, beside the two files of questions written by hand.
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from lopt_hf.common.files import write_text
from lopt_hf.retention.questions.grammar import grammar
from lopt_hf.retention.questions.library import library
from lopt_hf.retention.questions.measures import measures
from lopt_hf.retention.questions.numbers import numbers
from lopt_hf.retention.questions.programs import programs
from lopt_hf.retention.questions.question import Question, arrange
from lopt_hf.retention.questions.words import words
from lopt_hf.retention.questions.world import world

__all__ = ["AREAS", "main", "make"]

SEED = 20
FOLDER = Path(__file__).parents[1] / "tasks"

# Each area is a task; those who make its questions
AREAS: dict[str, tuple[Callable[[Random], list[Question]], ...]] = {
    "numbers": (numbers, measures),
    "words": (words, grammar),
    "code": (programs, library),
    "world": (world,),
}


def make(area: str) -> str:
    """Returns the questions of an area as JSON lines."""
    random = Random(f"{SEED} {area}")
    questions = [question for maker in AREAS[area] for question in maker(random)]
    rows = arrange(questions, random)
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)


def main() -> None:
    """Writes all files."""
    for area in AREAS:
        write_text(FOLDER / f"offline_{area}.jsonl", make(area))


if __name__ == "__main__":
    main()
