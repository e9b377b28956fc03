"""What the preparation cut away is refused where nothing is left, and counted where something is."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig

from lopt_hf.data.prepared import check_prepared, say_what_was_cut
from lopt_hf.repl.trainer import HealingConfig, heal
from tests.tiny import make_model

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


@pytest.mark.parametrize(
    ("before", "prepared", "count"),
    [
        ([{"text": "a b c"}] * 3, [WHOLE, {"input_ids": [1], "labels": [1]}, WHOLE], 2),  # cut already
        ([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}], [WHOLE, WHOLE], 1),
        ([{"chosen": "a"}] * 3, [pair([2], [3]), pair([2], [3, 4]), pair([2, 3], [4])], 2),
        ([{"text": "a"}], [{"input_ids": [1]}], 0),
        ([{"text": "a"}], [{"text": "a"}], 0),
    ],
    ids=["text", "tokens", "pairs", "short", "images"],
)
def test_rows_that_are_cut_are_counted(
    before: Any, prepared: Any, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    say_what_was_cut(Dataset.from_list(before), Dataset.from_list(prepared), 2)
    said = f"{count} of {len(prepared)} rows reach max_length=2 and are cut where they are longer"
    assert [message[: len(said)] for message in caplog.messages] == [said] * (count > 0)
    say_what_was_cut(Dataset.from_list(before), Dataset.from_list(prepared), None)
    assert len(caplog.messages) == (count > 0)


def test_healing_tells_what_was_cut(tmp_path: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(Exception):
        """Healing gets as far as to train."""

    class Cutting:
        def __init__(self, model: Any, train_dataset: Dataset, **kwargs: Any) -> None:
            self.train_dataset = train_dataset.select([0])

        def train(self) -> None:
            raise Stop

    monkeypatch.setattr("lopt_hf.repl.trainer.PlainHealingTrainer", Cutting)
    args = HealingConfig(output_dir=str(tmp_path), **ON_CPU, max_length=2)
    with pytest.raises(Stop):
        heal(make_model(), 0, Dataset.from_list([WHOLE] * 3), args, ModelConfig(), None)
    assert caplog.messages == ["max_length=2 cuts off the whole answer of 2 of 3 rows, which are left out."]
