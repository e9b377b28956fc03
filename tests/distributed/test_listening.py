"""Where the processes of one host listen: on the loopback, whoever may reach the host's other interfaces."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters

from lopt_hf.bench import processes
from lopt_hf.bench.pipeline import schedules
from lopt_hf.bench.pipeline.bench import run_pipeline_bench
from lopt_hf.bench.pipeline.settings import PipelineBenchSettings
from lopt_hf.common.host_launcher import HostRendezvous
from lopt_hf.common.host_store import LOOPBACK, host_store
from lopt_hf.common.launching import HOST_BACKEND
from lopt_hf.pipeline.runtime.launch import INTERFACE
from lopt_hf.pipeline.simulator import schedule_validation
from tests.distributed.pipeline_processes import Host
from tests.distributed.sockets import assert_on_loopback, listening, watched
from tests.forkserver import forked_instead_of_spawned
from tests.scripts.test_training import arguments
from tests.tiny import make_model, make_tokenizer


def test_the_rendezvous_of_a_launch() -> None:
    with watched(psutil.Process()) as found:
        handler = HostRendezvous(RendezvousParameters(HOST_BACKEND, "", "run", 1, 1))
        info = handler.next_rendezvous()
        info.store.set("key", "value")
        found |= listening(psutil.Process())
    assert info.bootstrap_store_info.master_port in {port for _, _, port in found}
    assert_on_loopback(found, 1)


class JoinedError(Exception):
    """In place of joining the other processes."""


def validate(port: int, folder: Path) -> None:
    schedule_validation._work(0, 1, port, folder, [])


def train_by_schedule(port: int, folder: Path) -> None:
    run: Any = SimpleNamespace(settings=SimpleNamespace(stages=1), port=port, folder="run")
    schedules.train_by_schedule(lambda: None, 0, run)


@pytest.mark.parametrize("begin", [validate, train_by_schedule])
def test_gloo_is_told_of_the_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: Any) -> None:
    """Its own choice is the address of the host's name, which others may reach."""

    def join(*args: Any, **kwargs: Any) -> None:
        raise JoinedError

    monkeypatch.setenv(INTERFACE, "")  # so that it is as before in the end
    monkeypatch.delenv(INTERFACE)
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(schedule_validation, "end_with_spawner", lambda: None)
    monkeypatch.setattr(schedules, "prepare", lambda settings: None)
    store = host_store()
    with pytest.raises(JoinedError):
        begin(store.port, tmp_path)
    assert LOOPBACK in [entry.address for entry in psutil.net_if_addrs()[os.environ[INTERFACE]]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options", "settings"),
    [("pipeline", [], {"num_stages": 2}), ("sft", ["--accelerate_config", "ddp_2"], {"use_cpu": True})],
)
def test_a_run_on_one_host(tmp_path: Path, command: str, options: list[str], settings: dict) -> None:
    given = [*arguments(tmp_path, "sft", **settings), *options]
    run = Host().start([sys.executable, "-m", "lopt_hf.cli", command, *given], tmp_path / "log")
    with watched(psutil.Process(run.pid)) as found:
        assert run.wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
    assert_on_loopback(found, 1 if command == "sft" else 3)  # the launcher's store, and gloo in each stage


@pytest.mark.slow
def test_a_benchmark_of_the_pipeline(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    settings = PipelineBenchSettings(
        model=str(tmp_path),
        methods=("ppll", "1f1b"),
        split="even",
        dtype="fp32",
        seq_length=16,
        rounds=1,
        warmup=1,
        steps=1,
    )
    with forked_instead_of_spawned(processes), watched(psutil.Process()) as found:
        run_pipeline_bench(settings, progress=False)
    assert_on_loopback(found, 1)


def test_a_port_that_is_taken_is_an_error() -> None:
    store = host_store()
    with pytest.raises(OSError, match="in use"):
        host_store(store.port)
