"""Rows of a data set for what is measured before training."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset

__all__ = ["spread_batches"]


def spread_batches(dataset: Any, size: int) -> Iterator[list[Any]]:
    """Yields batches of rows: of a data set with a length as far apart as they can be, of a stream the first ones.

    Args:
        dataset: A `Dataset` or an `IterableDataset`.
        size: Rows per batch; the last has what is left.
    """
    if isinstance(dataset, IterableDataset):
        rows = iter(dataset)
        while batch := list(islice(rows, size)):
            yield batch
        return
    assert isinstance(dataset, Dataset)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order), size):
        yield [dataset[index] for index in order[start : start + size]]
