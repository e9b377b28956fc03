"""What a launched process finds out of its place: its accelerator, and whether all are of one run."""

import json
import os
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lopt_hf import PipelineConfig
from lopt_hf.pipeline.runtime.launch import Rendezvous, check_same, init_world
from lopt_hf.pipeline.runtime.trainer import PipelineTrainer
from tests.forkserver import CONTEXT
from tests.tiny import make_dataset, make_model


def begin(folder, rank, number, visible, is_in_use, found):
    """What a process does up to its training arguments, on a host with so many GPUs."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible

    def count():
        return len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) if "CUDA_VISIBLE_DEVICES" in os.environ else number

    device_used, begun_anew = [], []
    replaced = {
        "torch.distributed.rendezvous": lambda *_: iter([(dist.HashStore(), rank, 4)]),
        "torch.accelerator.current_accelerator": lambda *_: torch.device("cuda") if number else None,
        "torch.cuda.is_available": lambda: number > 0,
        "torch.cuda.is_initialized": lambda: is_in_use,
        "torch.cuda.device_count": count,
        "torch.cuda.set_device": device_used.append,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "os.execv": lambda *command: begun_anew.append((os.environ["LOCAL_RANK"], *command)),
    }
    with ExitStack() as patches:
        for name, replacement in replaced.items():
            patches.enter_context(mock.patch(name, replacement))
        rendezvous = Rendezvous.from_environment()
        args = PipelineConfig(output_dir=str(folder), bf16=False, per_device_train_batch_size=8)
        size = args.train_batch_size
    sees = os.environ.get("CUDA_VISIBLE_DEVICES")
    found.put((sees, str(args.device), size, rendezvous.has_device, begun_anew))


def what_begins(*arguments):
    found = CONTEXT.SimpleQueue()
    process = CONTEXT.Process(target=begin, args=(*arguments, found))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return found.get()


@pytest.mark.parametrize(
    ("rank", "number", "visible", "expected"),
    [
        (0, 2, None, ("0", "cuda:0", 8, True)),
        (1, 2, None, ("1", "cuda:0", 8, True)),
        (1, 2, "4, 7", ("7", "cuda:0", 8, True)),
        (2, 3, "GPU-8a,GPU-f1,GPU-03", ("GPU-03", "cuda:0", 8, True)),
        (0, 1, None, (None, "cuda:0", 8, True)),
        (1, 1, None, (None, "cuda:0", 8, False)),
        (1, 0, None, (None, "cpu", 8, False)),
    ],
)
def test_each_process_has_one_accelerator(tmp_path, rank, number, visible, expected):
    """All of them would be the first for whoever trains as one process, with a batch for each that is there."""
    *found, begun_anew = what_begins(tmp_path, rank, number, visible, False)
    assert tuple(found) == expected
    assert not begun_anew


def test_a_process_begins_anew_where_an_import_has_used_the_accelerators(tmp_path):
    """The driver has read by then which of them it may use."""
    sees, *_, begun_anew = what_begins(tmp_path, 1, 2, None, True)
    assert sees == "1"
    ((local_rank, program, arguments),) = begun_anew
    assert (local_rank, program, arguments[0]) == ("0", sys.executable, sys.executable)


def test_more_processes_than_accelerators(monkeypatch):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    rendezvous = Rendezvous(dist.HashStore(), 1, 2, 1, has_device=False)
    with pytest.raises(ValueError, match="LOCAL_RANK=1, but this host has 1 accelerator and .* launch at most 1 here"):
        init_world(rendezvous, 2, 1, "cuda", 60.0)


def test_arguments_that_were_made_too_early(tmp_path):
    """They are of all accelerators of the host, over which the trainer would spread its batches."""
    args = PipelineConfig(output_dir=str(tmp_path), bf16=False)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="n_gpu=2, but a stage trains on one accelerator; make the training argum"):
        PipelineTrainer(make_model(), args, world=None, train_dataset=make_dataset())


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"seed": "0", "window": "1"}, "rank 1 was given no local_objective, but rank 0 'readout'; give all"),
        ({"seed": "0", "local_objective": "readout", "window": "1"}, "was given window='1', but rank 0 none; give"),
        ({"seed": "1", "local_objective": "readout"}, "rank 1 was given seed='1', but rank 0 '0'; give all"),
    ],
)
def test_settings_that_one_process_does_not_have(settings, cause):
    """As where the hosts were given different methods, each with arguments of its own."""
    store = dist.HashStore()
    store.set("same/arguments", json.dumps({"seed": "0", "local_objective": "readout"}))
    monitor = SimpleNamespace(rank=1, wait_for=lambda store, key: store.get(key).decode())
    with pytest.raises(ValueError, match=cause):
        check_same(store, monitor, 2, "arguments", settings)
