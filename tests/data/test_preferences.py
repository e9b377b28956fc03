"""Pairs for DPO lose no question without a word."""

from typing import Any

import pytest
from datasets import Dataset

from lopt_hf.data.preferences import to_preferences
from lopt_hf.data.rows import RowError

PAIR = {"chosen": "Hello", "rejected": "Go away"}
TURNS = {
    name: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for name, text in PAIR.items()
}


@pytest.mark.parametrize("answers", [PAIR, TURNS], ids=["text", "messages"])
@pytest.mark.parametrize("column", ["input", "context"])
def test_a_question_that_would_be_dropped_is_refused(column: str, answers: dict[str, Any]) -> None:
    rows = Dataset.from_list([{column: None, **answers}, {column: "Hi?", **answers}])
    with pytest.raises(RowError, match=f"row 2: '{column}' is 'Hi\\?', for which the layout of chosen and rejected"):
        to_preferences(rows)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"ask": "Hi?", **PAIR}, "chosen and rejected are trained on, not its ask"),
        ({"prompt": "Hi", "choices": ["a"], **PAIR}, "prompt and chosen and rejected are trained on, not its choices"),
        ({"instruction": "Hi", "input": "you", "system": "Be kind.", "images": [], **PAIR}, None),
    ],
)
def test_columns_that_are_left_out_are_named(row: dict[str, Any], said: str | None, caplog: Any) -> None:
    to_preferences(Dataset.from_list([row]))
    assert caplog.messages == ([] if said is None else [f"The data's {said}."])
