"""Preferences for DPO: pairs of a chosen and a rejected answer, with everything that was asked before them."""

from functools import partial
from typing import Any

from lopt_hf.data.messages import Message, holds_messages, read_messages, read_side, with_context
from lopt_hf.data.questions import QUESTION_COLUMNS
from lopt_hf.data.rows import (
    CONTEXT_COLUMNS,
    EARLIER_COLUMNS,
    DatasetT,
    Row,
    RowError,
    convert_rows,
    first_row,
    read_question,
    refuse_context,
    say_left_out,
    show,
)

__all__ = ["to_preferences"]

PROMPT_COLUMNS = (*QUESTION_COLUMNS, "instruction")  # in order of preference where there are several
READ_BY_TRL = ("image", "images")
ANSWERS = ("chosen", "rejected")
# Read here or by TRL; the last two repeat the others
KNOWN_COLUMNS = (
    *(*ANSWERS, *EARLIER_COLUMNS, *READ_BY_TRL, "tools", "chat_template_kwargs"),
    *("ref_chosen_logps", "ref_rejected_logps", "messages", "conversations"),
)


def to_preferences(dataset: DatasetT) -> DatasetT:
    """Brings pairs of answers into a layout that `DPOTrainer` reads, and checks every row.

    A question in a column of another name (`question`, `problem`, `query`, `instruction` with its `input`), a `system`
    message and a `history` become a conversational `prompt`; answers as text beside it become assistant messages.
    Answers that repeat their prompt beside a `prompt` as text, as in UltraFeedback, are parted from it. Everything
    else stays what it is: text as text, and answers that begin with their prompt where there is no other. A log line
    names the columns that are left out; without a question's column, one that a question belongs to (`input`,
    `context`, ...) is refused instead.

    Args:
        dataset: The data. Its rows are converted and checked at once, those of a stream as they come.

    Returns:
        The same kind of data set; the same object if it is a `Dataset` in which there is nothing to change, or one
        without `chosen` and `rejected`, which the trainer refuses.

    Raises:
        RowError: If a row has no question or answer, or one that cannot be read.
        ValueError: If the data set is empty.
    """
    first = first_row(dataset)
    if not first.keys() >= set(ANSWERS):
        return dataset
    found = [name for name in PROMPT_COLUMNS if name in first]
    column: str | None = next((name for name in found if first[name] is not None), found[0] if found else None)
    conversational = (
        column not in (None, "prompt") or any(holds_messages(first.get(name)) for name in ("prompt", *ANSWERS))
    )  # fmt: skip
    say_left_out(ANSWERS if column is None else (column, *ANSWERS), _unread(first, column))
    convert = partial(_read_pair, column=column, conversational=conversational)
    dropped = {column, "messages", "completion", "conversations"} - {"prompt"}
    return convert_rows(dataset, convert, [name for name in first if name in dropped])


def _unread(first: Row, column: str | None) -> list[str]:
    read = (column, "input") if column == "instruction" else (column,)
    return [name for name in first if name not in (*read, *KNOWN_COLUMNS)]


def _read_pair(row: Row, column: str | None, conversational: bool) -> dict[str, Any]:
    if column is None:
        others = [name for name in CONTEXT_COLUMNS if name not in READ_BY_TRL]
        refuse_context(row, others, "of chosen and rejected without a prompt")
    if not conversational:
        refuse_context(row, EARLIER_COLUMNS, "of a prompt and its answers as text")
        for name in ANSWERS if column is None else (column, *ANSWERS):
            read_side(row, name, conversational=False)
        return {}
    if column is None:
        return {name: with_context(row, read_messages(row, name)) for name in ANSWERS}
    chosen, rejected = (_read_answer(row, name) for name in ANSWERS)
    prompt = _read_prompt(row, column)
    if not _is_answer(chosen) or not _is_answer(rejected):
        prompt, chosen, rejected = _part(prompt, chosen, rejected, column)
    return {"prompt": with_context(row, prompt), "chosen": chosen, "rejected": rejected}


def _read_answer(row: Row, column: str) -> list[Message]:
    messages = read_side(row, column, True, "assistant")
    assert not isinstance(messages, str)
    if messages[-1]["role"] != "assistant":
        raise RowError(f"{column!r} ends with a message of {messages[-1]['role']!r}, not with the assistant's answer.")
    return messages


def _read_prompt(row: Row, column: str) -> list[Message]:
    if column == "prompt":
        prompt = read_side(row, column, True, "user")
        assert not isinstance(prompt, str)
        return prompt
    question = read_question(row, column, "input" if column == "instruction" else None, READ_BY_TRL)
    return [{"role": "user", "content": question}]


def _is_answer(messages: list[Message]) -> bool:
    return messages[0]["role"] == "assistant"


def _part(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], column: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Takes the prompt out of answers that begin with it; it has to be what the other column says."""
    limit = min(len(chosen), len(rejected)) - 1
    shared = next((k for k in range(limit) if chosen[k] != rejected[k]), limit)
    asked = [message.get("content") for message in chosen[:shared]]
    if any(message.get("content") not in asked for message in prompt):
        raise RowError(
            f"{column!r} is {show(prompt[-1].get('content'))}, but 'chosen' and 'rejected' begin otherwise: with "
            f"{show(chosen[0].get('content'))} and {show(rejected[0].get('content'))}; make them agree."
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]
