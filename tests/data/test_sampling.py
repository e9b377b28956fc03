"""Batches of rows for what is measured before training."""

from datasets import Dataset

from lopt_hf.data.sampling import spread_batches


def test_every_row_is_in_one_batch() -> None:
    """Of a stream in its order; the last batch has what is left."""
    dataset = Dataset.from_dict({"row": list(range(10))})
    streamed = [[row["row"] for row in batch] for batch in spread_batches(dataset.to_iterable_dataset(), 3)]
    assert streamed == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    shuffled = [[row["row"] for row in batch] for batch in spread_batches(dataset, 3)]
    assert [len(batch) for batch in shuffled] == [3, 3, 3, 1] and sorted(sum(shuffled, [])) == list(range(10))
