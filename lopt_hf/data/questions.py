"""Questions for GRPO: data sets brought to the column `prompt`, with the columns that rewards read."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset

__all__ = ["to_questions"]

DatasetT = TypeVar("DatasetT", Dataset, IterableDataset)

QUESTION_COLUMNS = ("prompt", "question", "problem", "query")  # in order of preference where there are several
REPEATING_COLUMNS = frozenset({"messages", "completion"})  # NuminaMath's conversations hold the solution once more


def to_questions(dataset: DatasetT, system_prompt: str | None = None) -> DatasetT:
    """Bring a data set to prompts, keeping the columns that a reward may read (`answer`, `solution`, ...).

    A question (`question` as in GSM8K, `problem` as in NuminaMath, `query`) becomes a conversation of one user
    message. A `prompt` stays what it is, text or a conversation, unless there is a system prompt, which needs one.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The data. Only the first row is looked at to find the column.
        system_prompt (`str`, *optional*):
            Put as a system message before each conversation that does not begin with one.

    Returns:
        The same kind of data set; the same object if there is nothing to change.

    Raises:
        ValueError: The data set is empty or has no column with questions.
    """
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("The data set is empty. Check the split and any filter applied to it.")
    found = [name for name in QUESTION_COLUMNS if name in first_row]
    if not found:
        raise ValueError(
            f"The data set's columns {list(first_row)} have no question; rename one to {', '.join(QUESTION_COLUMNS)}."
        )
    column = found[0]
    if column == "prompt" and system_prompt is None:
        return dataset
    dropped = ({column} | REPEATING_COLUMNS) - {"prompt"}
    return dataset.map(_converter(column, system_prompt), remove_columns=[c for c in first_row if c in dropped])


def _converter(column: str, system_prompt: str | None) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        question = row[column]
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
        return {"prompt": messages}

    return convert
