"""Each replica's share of the data, and what it has counted of it."""

import json
import shutil
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from lopt_hf.pipeline.runtime.replicas import own_share, own_stream
from tests.distributed.pipeline_processes import assert_succeeded, run, write_inputs
from tests.tiny import make_model


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


def test_the_figures_at_the_end_are_of_all_replicas_and_stages(tmp_path):
    write_inputs(tmp_path)
    settings = {"num_blocks": 2, "max_steps": 3, "save_strategy": "no", "save_steps": None}
    model = make_model()
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "embed_tokens" not in name)
    for replicas, rows in ((2, 2), (1, 4)):  # the same batches
        shared = {"data_parallel": replicas, "per_device_train_batch_size": rows}
        assert_succeeded(*run(tmp_path, tmp_path / f"of-{replicas}", ranks=2 * replicas, **settings, **shared))
        state = json.loads((tmp_path / f"of-{replicas}/trainer_state.json").read_text())
        *steps, final = state["log_history"]
        assert final["train_loss"] == pytest.approx(sum(step["loss"] for step in steps) / 3)
        rows_of_all = final["train_samples_per_second"] * final["train_runtime"]
        assert rows_of_all == pytest.approx(3 * 4, rel=0.01)
        tokens = final["total_flos"] / (6 * weights)  # padding included, of which smaller batches have less
        assert tokens == int(tokens) and state["total_flos"] == final["total_flos"]


def test_a_resumed_run_counts_what_each_replica_had_counted(tmp_path):
    """Between two logs: loss, metrics and tokens of the next log are of all replicas, as if there had been no stop."""
    write_inputs(tmp_path)
    settings = {"num_blocks": 2, "data_parallel": 2, "logging_steps": 3, "max_steps": 3, "save_steps": 2}
    for output_dir in ("whole", "resumed"):
        resumes = {"resume_from_checkpoint": "auto"} if output_dir == "resumed" else {}
        assert_succeeded(*run(tmp_path, tmp_path / output_dir, ranks=4, **settings, **resumes))
        if not resumes:
            shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    names = ("loss", "num_tokens", "mean_token_accuracy", "local_loss/block_0")
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("resumed", "whole")]
    resumed, whole = ([log["log_history"][0][name] for name in names] for log in logs)
    assert resumed == whole
    counts = [
        json.loads((tmp_path / "whole/checkpoint-2" / name / "local_learning.json").read_text())["total_train_tokens"]
        for name in ("stage-1", "stage-1-replica-1")
    ]
    assert counts[0] != counts[1], "equal counts would not show whose they are"
