"""What a trainer's preparation has left of the data."""

import logging
from collections.abc import Sequence
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset, IterableDataset

from lopt_hf.common.labels import IGNORED_LABEL

__all__ = ["check_answers_fit", "check_prepared", "say_what_was_cut"]

logger = logging.getLogger(__name__)

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def check_prepared(dataset: Any, args: Any, name: str = "train_dataset") -> None:
    """Checks that something of the answers is left where rows were cut at a length.

    Args:
        dataset: A data set as `SFTTrainer` or `DPOTrainer` has prepared it; what is none of these passes. Of a stream
            only the first row is read.
        args: Training arguments; those without `max_length` cut nothing.
        name: The data set's name, for the message.

    Raises:
        ValueError: If no row has a token to train on, or, of pairs, no two answers that differ.
    """
    max_length = getattr(args, "max_length", None)
    if max_length is None or not isinstance(dataset, Dataset | IterableDataset):
        return
    what = "a token"
    if isinstance(dataset, IterableDataset):
        is_trained_on = next(iter(dataset), None) is not None
    elif "labels" in dataset.column_names:
        rows = dataset.select_columns(["labels"])
        predicted = (label for row in rows for label in row["labels"][1:])  # nothing predicts the first
        is_trained_on = any(label != IGNORED_LABEL for label in predicted)
    elif set(PAIR_COLUMNS) <= set(dataset.column_names) and args.truncation_mode == "keep_start":
        what = "answers that differ"
        is_trained_on = any(_differs(row, max_length) for row in dataset.select_columns(list(PAIR_COLUMNS)))
    else:
        is_trained_on = len(dataset) > 0
    if not is_trained_on:
        raise _all_cut(max_length, name, what)


def check_answers_fit(dataset: Any, tokenizer: Any, args: Any, name: str = "train_dataset") -> None:
    """Checks before a model is loaded that a length leaves something of an answer, as `check_prepared` does later.

    Args:
        dataset: Prompts and completions, as texts or as messages; anything else, and a stream, passes.
        tokenizer: The model's tokenizer.
        args: Arguments of `SFTTrainer`.
        name: The data set's name, for the message.

    Raises:
        ValueError: If every prompt fills the length.
    """
    if not isinstance(dataset, Dataset) or not {"prompt", "completion"} <= set(dataset.column_names):
        return
    cuts_ends = args.max_length is not None and args.truncation_mode == "keep_start"
    splits = args.packing and args.packing_strategy != "bfd"  # what is over the length goes into the next row
    if not cuts_ends or splits or args.completion_only_loss is False or args.chat_template_path is not None:
        return
    if not any(_prompt_length(row["prompt"], tokenizer) < args.max_length for row in dataset):
        raise _all_cut(args.max_length, name, "a token")


def _prompt_length(prompt: str | list[dict[str, Any]], tokenizer: Any) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt, verbose=False)["input_ids"])
    if tokenizer.chat_template is None:  # the trainer says so
        return 0
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


def _all_cut(max_length: int, name: str, what: str) -> ValueError:
    return ValueError(
        f"max_length={max_length} cuts off every answer: no row of the {name} has {what} left to train on; raise "
        "max_length, or shorten the prompts."
    )


def _differs(row: dict[str, Any], max_length: int) -> bool:
    """Whether a pair's answers differ before both are cut, which DPO learns from."""
    room = max(0, max_length - len(row["prompt_ids"]))
    return bool(row["chosen_ids"][:room] != row["rejected_ids"][:room])


def say_what_was_cut(before: Any, prepared: Any, max_length: int | None) -> None:
    """Tells how many rows a trainer has left out, as no answer was within the length, and how many it has cut.

    Args:
        before: The data set that the trainer was given.
        prepared: The data set that it trains on; it is longer or shorter for other reasons where rows are packed.
        max_length: The length in tokens.
    """
    if not isinstance(before, Dataset) or not isinstance(prepared, Dataset) or not len(prepared):
        return
    if len(prepared) < len(before):
        logger.warning(
            "max_length=%s cuts off the whole answer of %d of %d rows, which are left out.",
            max_length,
            len(before) - len(prepared),
            len(before),
        )
    count = 0 if max_length is None else _count_cut(before, prepared, max_length)
    if count:
        logger.warning(
            "%d of %d rows reach max_length=%s and are cut where they are longer, within an answer too; raise it to "
            "keep them whole.",
            count,
            len(prepared),
            max_length,
        )


def _count_cut(before: Dataset, prepared: Dataset, max_length: int) -> int:
    """Counts rows over the length; of those that are cut already, the ones that have it."""
    if set(PAIR_COLUMNS) <= set(prepared.column_names):
        prompt, *answers = (_lengths(prepared, name) for name in PAIR_COLUMNS)
        return sum(asked + max(pair) > max_length for asked, *pair in zip(prompt, *answers, strict=True))
    if "input_ids" in before.column_names:
        return sum(length > max_length for length in _lengths(before, "input_ids"))
    if "input_ids" in prepared.column_names:
        return sum(length >= max_length for length in _lengths(prepared, "input_ids"))
    return 0


def _lengths(dataset: Dataset, column: str) -> Sequence[int]:
    table: pyarrow.Table = dataset.select_columns([column]).with_format("arrow")[:]
    lengths: list[int] = pyarrow.compute.list_value_length(table[column]).to_pylist()
    return lengths
