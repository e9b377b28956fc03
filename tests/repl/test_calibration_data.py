"""What calibration data are read as."""

import pytest
import torch
from datasets import Dataset

from lopt_hf import RepLConfig
from lopt_hf.repl.calibration_data import make_batches
from tests.tiny import make_tokenizer

CONFIG = RepLConfig(num_layers_to_replace=1, calibration_seq_length=4)
ROWS = {
    "input_ids": [[5, 6, 7, 8, 0, 0], [0, 9, 10, 11, 12, 0]],
    "attention_mask": [[1] * 4 + [0] * 2, [0, *[1] * 4, 0]],
}


@pytest.mark.parametrize("layout", [None, "torch", "numpy"])
def test_padding_of_tokenised_rows_is_left_out(layout):
    (batch,) = make_batches(Dataset.from_dict(ROWS).with_format(layout), None, CONFIG)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.mark.parametrize("layout", [None, "torch"])
def test_rows_of_tokens_alone(layout):
    data = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]}).with_format(layout)
    (batch,) = make_batches(data, None, CONFIG)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]


def test_batches_as_a_tokenizer_makes_them():
    made = make_tokenizer()(["123", "4"], return_tensors="pt", padding=True)
    (batch,) = make_batches([made], None, RepLConfig(num_layers_to_replace=1))
    assert set(batch) == set(made) and all(torch.equal(batch[name], made[name]) for name in made)
