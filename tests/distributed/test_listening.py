"""Where the processes of one host listen: on the loopback, whoever may reach the host's other interfaces."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from lopt_hf.bench import processes
from lopt_hf.bench.pipeline import run_pipeline_bench
from lopt_hf.bench.pipeline_settings import PipelineBenchSettings
from lopt_hf.common.host_store import host_store
from lopt_hf.pipeline.simulator.schedule import StageTimes, Workload
from lopt_hf.pipeline.simulator.schedule_validation import measure_schedules
from tests.distributed.pipeline_processes import Host
from tests.forkserver import forked_instead_of_spawned
from tests.scripts.test_training import arguments
from tests.tiny import make_model, make_tokenizer


def listening(process: psutil.Process) -> set[tuple[int, str, int]]:
    """Process, address and port of what a process and those that it started listen to."""
    found = set()
    with suppress(psutil.Error):
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                found |= {
                    (each.pid, *connection.laddr)
                    for connection in each.net_connections("tcp")
                    if connection.status == psutil.CONN_LISTEN
                }
    return found


@contextmanager
def watched(process: psutil.Process) -> Iterator[set[tuple[int, str, int]]]:
    """What is listened to within the block, besides what was before."""
    before, found, ended = listening(process), set[tuple[int, str, int]](), threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            found.update(listening(process) - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def assert_on_loopback(found: set[tuple[int, str, int]], processes: int) -> None:
    assert len({process for process, _, _ in found}) >= processes
    assert not [address for _, address, _ in found if not ip_address(address).is_loopback], found


@pytest.mark.parametrize(
    ("command", "options", "settings"),
    [
        ("pipeline", [], {"num_stages": 2}),
        pytest.param("sft", ["--accelerate_config", "ddp_2"], {"use_cpu": True}, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_one_host(tmp_path: Path, command: str, options: list[str], settings: dict) -> None:
    given = [*arguments(tmp_path, "sft", **settings), *options]
    run = Host().start([sys.executable, "-m", "lopt_hf.cli", command, *given], tmp_path / "log")
    with watched(psutil.Process(run.pid)) as found:
        assert run.wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
    assert_on_loopback(found, 1 if command == "sft" else 3)  # the launcher's store, and gloo in each stage


def test_a_measured_schedule() -> None:
    with watched(psutil.Process()) as found:
        measure_schedules([("ppll", Workload(StageTimes.equal(2, 0.01, 0.01), 2))])
    assert_on_loopback(found, 1)


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
