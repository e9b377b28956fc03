"""What the preparation cut away is refused where nothing is left, and counted where something is."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl import SFTConfig

from lopt_hf.data.prepared import check_prepared, say_what_was_cut

ON_CPU: dict[str, Any] = {"use_cpu": True, "bf16": False}
ARGS = SFTConfig(**ON_CPU, max_length=2)
CUT = {"input_ids": [1, 2], "labels": [-100, -100]}
WHOLE = {"input_ids": [1, 2], "labels": [-100, 2]}
FIRST_TOKEN_ONLY = {"input_ids": [1], "labels": [1]}


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def pair(chosen: list[int], rejected: list[int], prompt: Sequence[int] = (1,)) -> dict[str, Any]:
    return {"prompt_ids": list(prompt), "chosen_ids": chosen, "rejected_ids": rejected}


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_list([]),
        Dataset.from_list([CUT, CUT]),
        Dataset.from_list([FIRST_TOKEN_ONLY]),
        stream([]),
        Dataset.from_list([pair(chosen=[2, 3], rejected=[2, 4]), pair(chosen=[5], rejected=[5])]),
        Dataset.from_list([pair(chosen=[2], rejected=[3], prompt=[1, 1])]),
    ],
    ids=["none", "cut", "first token", "stream", "same beginnings", "no room"],
)
def test_nothing_to_train_on_is_refused(dataset: Any) -> None:
    with pytest.raises(
        ValueError, match="max_length=2 cuts off every answer: no row of the eval_dataset has (a token|answers)"
    ):
        check_prepared(dataset, ARGS, "eval_dataset")
    check_prepared(dataset, SFTConfig(**ON_CPU, max_length=None))  # not cut: the trainer's own matter


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_list([CUT, WHOLE]),
        Dataset.from_list([pair(chosen=[2], rejected=[2]), pair(chosen=[2], rejected=[3])]),
        stream([CUT]),
        {"a": Dataset.from_list([])},
        None,
    ],
    ids=["one row", "preferences", "stream", "several", "none given"],
)
def test_what_is_left_is_trained_on(dataset: Any) -> None:
    check_prepared(dataset, ARGS)
    check_prepared(dataset, TrainingArguments(use_cpu=True))  # cut nothing


def test_rows_left_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([WHOLE] * 5)
    with caplog.at_level(logging.WARNING, "lopt_hf"):
        for prepared in (rows, rows.select([]), stream([WHOLE])):
            say_what_was_cut(rows, prepared, 2)
        assert caplog.messages == []
        say_what_was_cut(rows, rows.select([0, 1]), 2)
    assert caplog.messages == ["max_length=2 cuts off the whole answer of 3 of 5 rows, which are left out."]
