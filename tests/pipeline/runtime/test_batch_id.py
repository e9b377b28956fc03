"""The checksum by which two stages notice that they train on different batches."""

import pytest
import torch

from lopt_hf.pipeline.runtime.channel import BatchId

PIXELS = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
BATCH = {"pixel_values": PIXELS, "labels": torch.tensor([0, 1])}


def checksum(**changes):
    return BatchId.of(BATCH | changes, step=0, micro_batch=0).checksum


def test_an_equal_batch_has_the_same_checksum():
    # In another order of memory, and of names
    columns_last = PIXELS.contiguous(memory_format=torch.channels_last)
    equal = {"labels": torch.tensor([0, 1]), "pixel_values": columns_last}

    assert BatchId.of(equal, 0, 0).checksum == checksum()


@pytest.mark.parametrize(
    "changes",
    [
        {"pixel_values": PIXELS.flip(0)},
        {"pixel_values": PIXELS.flip(-1)},  # an augmentation that was drawn otherwise
        {"pixel_values": PIXELS.bfloat16() + 1},
        {"labels": torch.tensor([1, 0])},
        {"count": torch.tensor(2)},
    ],
    ids=["rows", "pixels", "dtype", "labels", "one more"],
)
def test_another_batch_has_another_checksum(changes):
    assert checksum(**changes) != checksum()


def test_each_dtype_is_told_apart():
    numbers = torch.tensor([0.0, 1.0, 2.0])
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)

    assert len({checksum(pixel_values=numbers.to(dtype)) for dtype in dtypes}) == len(dtypes)
