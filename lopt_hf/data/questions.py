"""Questions for GRPO: data sets brought to the column `prompt`, with the columns that rewards read."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lopt_hf.data.messages import holds_messages, read_side, with_context
from lopt_hf.data.rows import (
    CONTEXT_COLUMNS,
    EARLIER_COLUMNS,
    DatasetT,
    Row,
    RowError,
    convert_rows,
    first_row,
    has_value,
    refuse_context,
    say_left_out,
    show,
)

__all__ = ["QUESTION_COLUMNS", "to_questions"]

QUESTION_COLUMNS = ("prompt", "question", "problem", "query")  # in order of preference where there are several
REPEATING_COLUMNS = frozenset({"messages", "completion"})  # NuminaMath's conversations hold the solution once more
READ_BY_TRL = ("image", "images")
LOST_COLUMNS = tuple(name for name in CONTEXT_COLUMNS if name not in READ_BY_TRL)


def to_questions(dataset: DatasetT, system_prompt: str | None = None, references: Sequence[str] = ()) -> DatasetT:
    """Brings a data set to prompts, and keeps the columns that a reward may read (`answer`, `solution`, ...).

    A question (`question` as in GSM8K, `problem` as in NuminaMath, `query`) becomes a conversation of one user
    message, after the row's `system` and `history` if it has them. A `prompt` stays what it is, text or a
    conversation, unless there is a system prompt, which needs one. A column that a question depends on (`choices`,
    `context`, ...) is refused; beside a `prompt`, which its maker has put together, a log line names it.

    Args:
        dataset: The data. Its rows are converted and checked at once, those of a stream as they come.
        system_prompt: Put as a system message before each conversation that does not begin with one.
        references: Columns that rewards compare completions with. Of those that there are, each row must have a value
            in one.

    Returns:
        The same kind of data set; the same object if it is a `Dataset` in which there is nothing to change.

    Raises:
        RowError: If a row has no question, or one that cannot be read; the message names row, column and value.
        ValueError: If the data set is empty or has no column with questions.
    """
    first = first_row(dataset)
    found = [name for name in QUESTION_COLUMNS if name in first]
    if not found:
        raise ValueError(
            f"The data set's columns {list(first)} have no question; rename one to {', '.join(QUESTION_COLUMNS)}."
        )
    column = next((name for name in found if first[name] is not None), found[0])
    stays_text = column == "prompt" and system_prompt is None and not holds_messages(first["prompt"])
    convert = partial(
        _read_question,
        column=column,
        system_prompt=system_prompt,
        conversational=not stays_text,
        references=[name for name in references if name in first],
    )
    if column == "prompt":
        say_left_out([column], [name for name in first if name in LOST_COLUMNS])
    becomes_prompt = column != "prompt" or system_prompt is not None
    dropped = ({column} | REPEATING_COLUMNS) - {"prompt"} if becomes_prompt else set()
    return convert_rows(dataset, convert, [name for name in first if name in dropped])


def _read_question(
    row: Row, column: str, system_prompt: str | None, conversational: bool, references: Sequence[str]
) -> dict[str, Any]:
    if references and not any(has_value(row, name) for name in references):
        raise RowError(
            f"{references[0]!r} is {show(row.get(references[0]))}, with which the reward compares; give it."
        )
    question = read_side(row, column, conversational, "user")
    if isinstance(question, str):
        refuse_context(row, EARLIER_COLUMNS, "of a prompt as text")
        return {}
    if column != "prompt":  # which its maker has put together
        refuse_context(row, LOST_COLUMNS, f"of a {column}")
    messages = with_context(row, question)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return {"prompt": messages}
