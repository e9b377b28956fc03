"""What calibration data are read as."""

import pytest
import torch
from datasets import Dataset

from lopt_hf import RepLConfig, get_repl_model
from lopt_hf.repl.calibration_data import make_batches
from tests.repl.helpers import make_stock
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


CHOICES = [
    {"num_layers_to_replace": 1},
    {"num_layers_to_replace": 1, "placement": "span"},
    {"num_layers_to_replace": 1, "placement": "span", "span_criterion": "angle"},
    {"spans": [[2, 3]]},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_sequences_of_padding_alone_count_for_nothing(choice):
    """Whole batches of them, and every one that would be held out."""
    ids_BT = torch.randint(3, 80, (16, 8), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[7::8] = 0
    padding = {"input_ids": ids_BT, "attention_mask": torch.zeros_like(ids_BT)}
    kept_BT = mask_BT.bool().any(1)
    mixed = {"input_ids": ids_BT, "attention_mask": mask_BT}
    without = {"input_ids": ids_BT[kept_BT], "attention_mask": mask_BT[kept_BT]}
    found, expected = (
        get_repl_model(make_stock(), RepLConfig("scale", **choice), data) for data in ([padding, mixed], [without])
    )
    assert found.config.repl["removed"] == expected.config.repl["removed"]
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_padding_alone_is_no_data():
    padding = make_tokenizer()(["1", "2"], return_tensors="pt")
    padding["attention_mask"].zero_()
    with pytest.raises(ValueError, match="calibration_data has padding alone: every attention_mask is 0; give"):
        make_batches([padding], None, RepLConfig(num_layers_to_replace=1))
