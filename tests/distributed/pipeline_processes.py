"""Starts the processes of a pipeline, looks at how they end, and reads what they trained.

The processes are forked from one that has imported everything, so that a launch takes a second and not fifteen. The
rendezvous store is in the test's own process, where a launcher's would be; but nobody ends the others when one fails,
as on several hosts: they have to notice by themselves.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed.pipeline_fault_worker import Fault, run_rank
from tests.forkserver import CONTEXT
from tests.tiny import make_dataset, make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.77.1", "10.213.77.2")

SETTINGS = {
    "num_blocks": 3,
    "gradient": "local",
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.01,
    "max_length": 64,
    "activation_checkpointing": False,
    "bf16": False,
    "report_to": "none",
    "seed": 0,
}


def write_inputs(folder: Path) -> None:
    """A tiny model and its data."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_dataset().to_json(folder / "data.json")


def arguments(inputs: Path, output_dir: Path, **settings: object) -> list[str]:
    """The command line of `lopt-hf pipeline`."""
    named = {"model_name_or_path": inputs / "model", "dataset_name": inputs / "data.json", "output_dir": output_dir}
    pairs = {**named, **SETTINGS, **settings}.items()
    return [text for name, value in pairs if value is not None for text in (f"--{name}", str(value))]


class Processes:
    """The running processes of one launch.

    Args:
        commands: Arguments of each rank.
        logs: Folder for what they print.
        faults: What goes wrong.
        target: What each runs; it is given its rank, the launcher's variables, its log, its arguments and the faults.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        logs: Path,
        faults: Sequence[Fault] = (),
        target: Callable[..., None] = run_rank,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank-{rank}.log" for rank in range(len(commands))]
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "WORLD_SIZE": str(len(commands)),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self.processes = [
            CONTEXT.Process(target=target, args=(rank, environment, self.logs[rank], command, list(faults)))
            for rank, command in enumerate(commands)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int) -> bool:
        """Kills one process; returns whether it was still running."""
        process = self.processes[rank]
        if not process.is_alive():
            return False
        process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL

    def signal(self, number: int) -> None:
        """Sends a signal to all."""
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def wait(self, timeout: float) -> list[int | None]:
        """Waits for all to end; returns their exit codes, of a process that has not ended `None`."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""


def run(
    inputs: Path,
    output_dir: Path,
    *,
    ranks: int = 3,
    faults: Sequence[Fault] = (),
    per_rank: Mapping[int, Mapping[str, object]] | None = None,
    timeout: float = 120,
    **settings: object,
) -> tuple[list[int | None], list[str]]:
    """Runs a pipeline to its end; returns exit codes and outputs of all ranks."""
    others = per_rank or {}
    commands = [
        arguments(inputs, **{"output_dir": output_dir, **settings, **others.get(rank, {})}) for rank in range(ranks)
    ]
    processes = Processes(commands, output_dir.parent / f"{output_dir.name}-logs", faults)
    codes = processes.wait(timeout)
    return codes, [processes.output(rank) for rank in range(ranks)]


def assert_succeeded(codes: Sequence[int | None], outputs: Sequence[str]) -> None:
    assert list(codes) == [0] * len(codes), "\n".join(text[-1500:] for text in outputs)


def read_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(output_dir.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_same_model(output_dir: Path, reference: Path) -> None:
    """Bit by bit."""
    weights, expected = read_weights(output_dir), read_weights(reference)
    assert weights.keys() == expected.keys() and expected
    different = [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert not different, different


def checkpoints(output_dir: Path) -> list[str]:
    return sorted(name for name in os.listdir(output_dir) if name.startswith("checkpoint-"))


# ---- Launched as a user does ----


class Host:
    """A network namespace that stands for a host, or this host itself.

    Args:
        namespace: Its name; default: this host.
    """

    def __init__(self, namespace: str | None = None) -> None:
        self.enter = [] if namespace is None else ["ip", "netns", "exec", namespace]

    def start(self, command: Sequence[str], log: Path, **environment: str) -> "subprocess.Popen[bytes]":
        """Starts a command here, with its output in a file."""
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with log.open("wb") as file:
            return subprocess.Popen(
                [*self.enter, *command], cwd=ROOT, env=settings, stdout=file, stderr=subprocess.STDOUT
            )


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Callable[[], None]]]:
    """Two network namespaces with a cable between them, and what cuts it.

    Raises:
        PermissionError: If they cannot be made here.
    """
    tag = os.getpid()
    first, second = f"lopt-{tag}-0", f"lopt-{tag}-1"
    made = [["ip", "netns", "add", first], ["ip", "netns", "add", second]]
    made += [["ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second]]
    for name, address in ((first, ADDRESSES[0]), (second, ADDRESSES[1])):
        inside = ["ip", "-n", name]
        made += [[*inside, "address", "add", f"{address}/24", "dev", "cable"]]
        made += [[*inside, "link", "set", device, "up"] for device in ("cable", "lo")]
    try:
        for command in made:
            if subprocess.run(command, capture_output=True).returncode != 0:
                raise PermissionError(" ".join(command))
        cut = ["ip", "-n", second, "link", "set", "cable", "down"]
        yield Host(first), Host(second), lambda: subprocess.run(cut, check=True)
    finally:
        for name in (first, second):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def launch_command(num_machines: int, machine: int, num_processes: int, *launcher: str) -> list[str]:
    """`accelerate launch` of the pipeline, to which its arguments are to be added."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", str(num_machines)]
    command += ["--machine_rank", str(machine), "--num_processes", str(num_processes), "--mixed_precision", "no"]
    return [*command, "--dynamo_backend", "no", *launcher, "-m", "lopt_hf.scripts.pipeline"]
