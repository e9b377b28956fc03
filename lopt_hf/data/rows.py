"""Rows of a data set, each checked as it is read: a row that cannot be trained on is named by its number.

Row numbers count from 1, as the lines of a `.jsonl` file do.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import pyarrow
from datasets import Dataset, Features, IterableDataset, Json, List

__all__ = [
    "CONTEXT_COLUMNS",
    "EARLIER_COLUMNS",
    "DatasetT",
    "EmptyRowError",
    "Row",
    "RowError",
    "convert_rows",
    "first_row",
    "has_value",
    "read_question",
    "read_text",
    "refuse_context",
    "say_left_out",
    "show",
]

logger = logging.getLogger(__name__)

DatasetT = TypeVar("DatasetT", Dataset, IterableDataset)
Row = Mapping[str, Any]

# What an answer depends on: never dropped without being asked. The first three come before any conversation, the
# others belong to a question.
EARLIER_COLUMNS = ("system", "system_prompt", "history")
CONTEXT_COLUMNS = ("input", "context", "choices", "options", "functions", "image", "images", "audio", "videos")

# `datasets` keeps what was converted and finds it by the converter's name, not by its code: count up when rows of the
# same columns are converted in another way.
CONVERSION = 1


# What `datasets` raises for values that are not of the type which it told from the first rows
CAST_ERRORS = (TypeError, OverflowError, UnicodeEncodeError, pyarrow.ArrowException)


class RowError(ValueError):
    """A row that cannot be trained on; the message names row, column, value and fix."""


class EmptyRowError(RowError):
    """A row without the text that it is for."""


def first_row(dataset: Dataset | IterableDataset) -> Row:
    """Returns the first row; of a stream, what is read for it is read again later.

    Raises:
        ValueError: If there is none.
    """
    row: Row | None = next(iter(dataset), None)
    if row is None:
        raise ValueError("The data set is empty. Check the split and any filter applied to it.")
    return row


def has_value(row: Row, column: str) -> bool:
    """Tells whether a row has the column and something in it: no null, no blank text, no empty list.

    In Parquet files, and wherever rows with different keys are put together, every row has every key.
    """
    value = row.get(column)
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, list | dict) and not value)


def show(value: Any) -> str:
    """The value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_text(row: Row, column: str) -> str:
    """Reads a column that has to hold text.

    Raises:
        RowError: If it is missing, null, blank or something else.
    """
    if column not in row:
        raise RowError(f"{column!r} is missing; the row has {', '.join(map(repr, row)) or 'no columns'}.")
    value = row[column]
    if value is None:
        raise EmptyRowError(f"{column!r} is null; give it text, or remove the row.")
    if not isinstance(value, str):
        raise RowError(f"{column!r} holds {type(value).__name__} {show(value)}, not text; write it as text.")
    if not value.strip():
        raise EmptyRowError(f"{column!r} is empty; give it text, or remove the row.")
    return value


def read_question(row: Row, column: str, more_input: str | None = None, others: Sequence[str] = ()) -> str:
    """Reads a question with the input that follows it after a blank line.

    Args:
        row: The row.
        column: The question's column.
        more_input: The column with more input, which may be missing or empty.
        others: Context columns that are read elsewhere.

    Raises:
        RowError: If there is no question, or if it depends on a further column that has no place.
    """
    question = read_text(row, column)
    if more_input is not None and has_value(row, more_input):
        question = f"{question}\n\n{read_text(row, more_input).strip()}"
    used = (more_input, *others)
    refuse_context(row, [name for name in CONTEXT_COLUMNS if name not in used], f"of a {column}")
    return question


def refuse_context(row: Row, columns: Sequence[str], layout: str) -> None:
    """Refuses a row whose answer depends on a column that the layout has no place for.

    Args:
        row: The row.
        columns: Columns that would be lost.
        layout: The layout's name, for the message.

    Raises:
        RowError: If one of them has a value.
    """
    for name in columns:
        if has_value(row, name):
            raise RowError(
                f"{name!r} is {show(row[name])}, for which the layout {layout} has no place; write it into the "
                "prompt, or rename or remove the column."
            )


def say_left_out(read: Sequence[str], unread: Sequence[str]) -> None:
    """Tells in one line which columns are trained on and which are not; nothing where all are."""
    if unread:
        are = "is" if len(read) == 1 else "are"
        logger.warning("The data's %s %s trained on, not its %s.", " and ".join(read), are, ", ".join(unread))


def convert_rows(
    dataset: DatasetT, convert: Callable[[Row], dict[str, Any]], dropped: Sequence[str], skips_empty: bool = False
) -> DatasetT:
    """Converts and checks all rows: those of a `Dataset` now, those of a stream as they come.

    Args:
        dataset: The rows.
        convert: Returns what a row's columns become; raises `RowError` for one that cannot be trained on.
        dropped: Columns that there are, to leave out of the result.
        skips_empty: Leave out rows without text, instead of refusing them, and say how many there were, but of a
            stream, where nobody knows before its end.

    Returns:
        The same kind of data set; the same object where it is a `Dataset` whose rows all stay as they are.

    Raises:
        RowError: If a row cannot be trained on; the message begins with its number.
    """
    numbered = partial(_convert_numbered, convert=convert, version=CONVERSION)
    if skips_empty:
        dataset = _without_empty(dataset, numbered)
    numbered(first_row(dataset), 0)  # also of a stream, whose other rows are read much later
    if isinstance(dataset, Dataset) and not _changes(dataset, numbered):
        return dataset.remove_columns(list(dropped)) if dropped else dataset
    if isinstance(dataset, Dataset):
        return _convert_table(dataset, numbered, list(dropped))
    return dataset.map(numbered, with_indices=True, remove_columns=list(dropped))


def _without_empty(dataset: DatasetT, numbered: Callable[[Row, int], dict[str, Any]]) -> DatasetT:
    kept: DatasetT = dataset.filter(partial(_has_text, numbered=numbered), with_indices=True)
    if not isinstance(dataset, Dataset):
        return kept
    if len(kept) == len(dataset):  # type: ignore[arg-type]
        return dataset
    left_out = len(dataset) - len(kept)  # type: ignore[arg-type]
    logger.warning("%d of %d rows have no text and are left out.", left_out, len(dataset))
    return kept


def _has_text(row: Row, index: int, numbered: Callable[[Row, int], dict[str, Any]]) -> bool:
    try:
        numbered(row, index)
    except EmptyRowError:
        return False
    return True


def _changes(dataset: Dataset, numbered: Callable[[Row, int], dict[str, Any]]) -> bool:
    """Checks rows until one changes; the conversion checks them all."""
    for index, row in enumerate(dataset):
        if any(name not in row or row[name] != value for name, value in numbered(row, index).items()):
            return True
    return False


def _convert_table(dataset: Dataset, numbered: Callable[[Row, int], dict[str, Any]], dropped: list[str]) -> Dataset:
    """Converts the rows to columns of the type that the first ones have, or to JSON where later ones do not fit it."""
    try:
        return dataset.map(numbered, with_indices=True, remove_columns=dropped)
    except CAST_ERRORS:
        logger.info("Messages of later rows have other keys or types than those of the first: they are kept as JSON.")
    messages = dict.fromkeys(numbered(dataset[0], 0), List(Json()))
    kept = {name: feature for name, feature in dataset.features.items() if name not in dropped}
    as_json = partial(_as_json, numbered=numbered)
    return dataset.map(as_json, with_indices=True, remove_columns=dropped, features=Features(kept | messages))


def _as_json(row: Row, index: int, numbered: Callable[[Row, int], dict[str, Any]]) -> dict[str, list[str]]:
    """Converts a row to the text that the type `Json` keeps of each of its messages."""
    return {
        name: [_to_json(message, f"row {index + 1}: {name!r}") for message in messages]
        for name, messages in numbered(row, index).items()
    }


def _to_json(message: Any, place: str) -> str:
    try:
        text = json.dumps(message, ensure_ascii=False, allow_nan=False)
        text.encode()  # half of a character has no code
        # `Json` reads longer numbers as others
        json.loads(text, parse_int=lambda digits: int(digits).to_bytes(8, "big", signed=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise RowError(
            f"{place} holds {show(message)}, which cannot be kept as JSON ({error}); write what is in it as text."
        ) from None
    return text


def _convert_numbered(row: Row, index: int, convert: Callable[[Row], dict[str, Any]], version: int) -> dict[str, Any]:
    try:
        return convert(row)
    except RowError as error:
        raise type(error)(f"row {index + 1}: {error}") from None
