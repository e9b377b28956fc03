"""Each replica's share of the data."""

from types import SimpleNamespace

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from lopt_hf.pipeline.runtime.replicas import own_share, own_stream


def share_of(replica, dataset):
    world = SimpleNamespace(num_replicas=2, replica=replica)
    loader = DataLoader(own_stream(dataset, world, 2), batch_size=2)
    return [batch["row"].tolist() for batch in own_share(loader, world, "cpu")]


def rows_of(lengths):
    for length in lengths:
        yield from ({"row": 10 * length + row} for row in range(length))


def test_replicas_take_turns_in_a_stream_as_in_a_data_set():
    """Of two files of different length; the last batches are filled up from the start."""
    stream = IterableDataset.from_generator(rows_of, gen_kwargs={"lengths": [7, 3]})
    assert stream.num_shards == 2
    shares = [share_of(replica, stream) for replica in range(2)]
    assert shares == [[[70, 71], [74, 75], [31, 32]], [[72, 73], [76, 30], [70, 71]]]
    assert shares == [share_of(replica, Dataset.from_list(list(rows_of([7, 3])))) for replica in range(2)]
