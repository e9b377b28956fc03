"""Two gloo processes end where one process with the same global batch does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lopt_hf.common.distributed import GradientReducer
from lopt_hf.common.upstream.torch import ignored_by_ddp
from tests.distributed.ddp_worker import EQUAL_TO_ONE, run


def test_the_processes_end_without_an_error(two_processes):
    """Also behind the last run, where DDP's reducer has to go before the process group does."""
    assert two_processes.return_code == 0, two_processes.errors


@pytest.mark.parametrize("name", EQUAL_TO_ONE)
def test_two_processes_equal_one(two_processes, tmp_path, name):
    """The same micro-batches, half of them on each rank."""
    settings = EQUAL_TO_ONE[name]
    accumulation = 2 * settings.get("gradient_accumulation_steps", 1)
    _, one = run(tmp_path, **{**settings, "gradient_accumulation_steps": accumulation})
    two = two_processes.weights(name)
    assert two.keys() == one.keys()
    worst = {name: ((two[name] - weight).norm() / weight.norm()).item() for name, weight in one.items()}
    assert max(worst.values()) <= 1e-6, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("prefix", ["", "reach, "])
def test_local_step_changes_no_bit(two_processes, prefix):
    local, deferred = two_processes.weights(f"{prefix}local step"), two_processes.weights(f"{prefix}deferred step")
    assert all(torch.equal(local[name], deferred[name]) for name in deferred)
    logs = [
        json.loads((two_processes.folder / f"{prefix}{name} step" / "log_history.json").read_text())
        for name in ("local", "deferred")
    ]
    norms = [[record["grad_norm"] for record in log if "grad_norm" in record] for log in logs]
    assert norms[0] == norms[1] and len(norms[0]) == 3


def test_both_ranks_load_the_best_model(two_processes):
    weights, folder = two_processes.weights("best model"), two_processes.folder / "best model"
    best = json.loads((folder / "checkpoint-3/trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best).parent == folder and Path(best).name != "checkpoint-3"
    saved = load_file(Path(best) / "model.safetensors")
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def test_the_marks_for_ddp_are_taken_off_again():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with ignored_by_ddp(model, ["0.weight"]):
        assert model._ddp_params_and_buffers_to_ignore == ["0.weight"]
    assert not model._ddp_params_and_buffers_to_ignore
    assert not any(vars(parameter).get("_ddp_ignored") for parameter in model.parameters())


def test_buckets_hold_every_gradient_once():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 5, 2, 7)]
    for parameter in parameters[:3]:
        parameter.grad = torch.ones_like(parameter)
    buckets = list(GradientReducer(bucket_bytes=4 * 6)._buckets(parameters))
    assert [[g.numel() for g in bucket] for bucket in buckets] == [[2, 5], [3]]
