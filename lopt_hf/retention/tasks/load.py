"""The data of the `offline` tasks: files of questions beside this one, and prose that every Python carries.

The questions were written for this package, so no data set's licence or hub is needed to run them: those of
`knowledge` and `language` by hand, the others by rule (`lopt_hf.retention.questions.make`).
"""

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from lopt_hf.common.evaluation import general_text

__all__ = ["code", "knowledge", "language", "numbers", "prose", "prose_documents", "words", "world"]

QUESTIONS = Path(__file__).parent
ORDER_SEED = 0

MIN_DOCUMENT = 1500  # characters
MIN_PARAGRAPH = 150
MAX_PARAGRAPH = 1000  # so that no document exceeds MIN_DOCUMENT + MAX_PARAGRAPH
MIN_LETTERS = 0.92  # share of letters and spaces; text below it is mostly about code
NOT_PROSE = re.compile(r"\s|\*|\[|\d|(New|Changed|Deprecated) (in|since) version")


def knowledge(**_: Any) -> dict[str, Dataset]:
    """Questions of general knowledge, with `question`, four `choices`, the `answer`'s index and the `topic`."""
    return _questions("offline_knowledge.jsonl")


def language(**_: Any) -> dict[str, Dataset]:
    """Questions on words, grammar, sayings and how a sentence goes on; the fields are those of `knowledge`."""
    return _questions("offline_language.jsonl")


def numbers(**_: Any) -> dict[str, Dataset]:
    """Questions on calculations, units, the calendar; also with `difficulty`, from 1 to 5, and a `cluster`.

    Their order is such that the first ones, however many, are of all topics and difficulties in their shares.
    """
    return _made_questions("offline_numbers.jsonl")


def words(**_: Any) -> dict[str, Dataset]:
    """Questions on letters, spelling, meaning and forms of words; fields and order are those of `numbers`."""
    return _made_questions("offline_words.jsonl")


def code(**_: Any) -> dict[str, Dataset]:
    """Questions on what Python prints and on its standard library; fields and order are those of `numbers`."""
    return _made_questions("offline_code.jsonl")


def world(**_: Any) -> dict[str, Dataset]:
    """Questions on countries, elements, characters, status codes; fields and order are those of `numbers`."""
    return _made_questions("offline_world.jsonl")


def prose(**_: Any) -> dict[str, Dataset]:
    """The documents of `prose_documents` in the field `text`."""
    return {"test": Dataset.from_dict({"text": prose_documents(general_text())})}


def prose_documents(text: str) -> list[str]:
    """Picks paragraphs of prose from a reference manual and joins them to documents of 1,500 to 2,500 characters.

    The manual is another one in every Python version (sections are added and reworded), and so are the documents:
    compare figures that were measured with the same version.

    Args:
        text: Paragraphs separated by blank lines, as `lopt_hf.common.evaluation.general_text` gives them. A paragraph
            that occurs again is left out, as the manual repeats whole sections under several topics.
    """
    documents, current = [], ""
    for paragraph in dict.fromkeys(map(_unwrapped, text.split("\n\n"))):
        if not _is_prose(paragraph):
            continue
        current = f"{current}\n{paragraph}" if current else paragraph
        if len(current) >= MIN_DOCUMENT:
            documents.append(current)
            current = ""
    return documents


def _questions(file: str) -> dict[str, Dataset]:
    """Loads questions in a fixed random order: the file is sorted by topic, and lm-eval's `limit` takes the first."""
    return {"test": Dataset.from_list(_rows(file)).shuffle(seed=ORDER_SEED)}


def _made_questions(file: str) -> dict[str, Dataset]:
    """Loads questions in the file's order, whose beginning is a stratified sample."""
    return {"test": Dataset.from_list(_rows(file))}


def _rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUESTIONS / file).read_text(encoding="utf-8").split("\n") if line]


def _unwrapped(paragraph: str) -> str:
    """The paragraph as one line; what was indented, that is code, tables and lists, stays indented."""
    without_line_ends = re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", paragraph)
    return re.sub(r"(?<=\S)\s+", " ", without_line_ends).rstrip()


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is running text that stands on its own: it ends its sentence, and holds little code."""
    if NOT_PROSE.match(paragraph) or not paragraph.endswith("."):
        return False
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return MIN_PARAGRAPH <= len(paragraph) <= MAX_PARAGRAPH and letters / len(paragraph) >= MIN_LETTERS
