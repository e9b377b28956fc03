"""What a trainer's preparation has left of the data."""

import logging
from typing import Any

from datasets import Dataset, IterableDataset

__all__ = ["check_prepared", "say_what_was_cut"]

logger = logging.getLogger(__name__)


def check_prepared(dataset: Any, max_length: int | None, name: str = "train_dataset") -> None:
    """Checks that something of the answers is left where rows were cut at a length.

    Args:
        dataset: A data set as `SFTTrainer` or `DPOTrainer` has prepared it, with `labels` or `chosen_ids`; what is
            none of these passes. Of a stream only the first row is read.
        max_length: The length in tokens; `None` where nothing was cut.
        name: The data set's name, for the message.

    Raises:
        ValueError: If no row has a token to train on.
    """
    if max_length is None or not isinstance(dataset, Dataset | IterableDataset):
        return
    if isinstance(dataset, IterableDataset):
        is_empty = next(iter(dataset), None) is None
    elif "labels" in dataset.column_names:
        # The first token is predicted from nothing
        rows = dataset.select_columns(["labels"])
        is_empty = not any(label != -100 for row in rows for label in row["labels"][1:])
    else:
        is_empty = len(dataset) == 0
    if is_empty:
        raise ValueError(
            f"max_length={max_length} cuts off every answer: no row of the {name} has a token left to train on; raise "
            "max_length, or shorten the prompts."
        )


def say_what_was_cut(before: Any, prepared: Any, max_length: int | None) -> None:
    """Tells in one line how many rows a trainer has left out because nothing of their answers was within the length.

    Args:
        before: The data set that the trainer was given.
        prepared: The data set that it trains on; it is longer or shorter for other reasons where rows are packed.
        max_length: The length in tokens.
    """
    if isinstance(before, Dataset) and isinstance(prepared, Dataset) and 0 < len(prepared) < len(before):
        logger.warning(
            "max_length=%s cuts off the whole answer of %d of %d rows, which are left out.",
            max_length,
            len(before) - len(prepared),
            len(before),
        )
