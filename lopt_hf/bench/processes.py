"""The processes of a benchmark: several that run together, and how they tell of their failures."""

import multiprocessing
import os
import platform
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lopt_hf.common.parent import end_with_spawner

__all__ = [
    "MALLOC",
    "MALLOC_HELP",
    "BenchWorkerError",
    "changed_environment",
    "death_of",
    "failure_of",
    "failures_sent",
    "one_gpu",
    "peak_resident_bytes",
    "receive",
    "run_together",
]

GRACE_SECONDS = 5.0
# glibc: no block is mapped by itself, and the top of the heap is never given back. Without this, large tensors are
# mapped anew at each step, and the kernel clears their pages again.
MALLOC = {"keep": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}, "default": {}}
MALLOC_HELP = "keep: glibc keeps freed memory for the next step, see above; default: it does not."


class BenchWorkerError(RuntimeError):
    """A method's process failed; the message names the method and the reason, `__cause__` has its traceback."""


def failure_of(name: str, reason: str, trace: str) -> BenchWorkerError:
    """The error to raise for a process that sent what ended it."""
    error = BenchWorkerError(f"{name}: {reason}")
    error.__cause__ = RuntimeError(f"in its process:\n{trace}")
    return error


def death_of(name: str, exit_code: int | None) -> BenchWorkerError:
    """The error to raise for a process that ended without a word."""
    hint = "; it was killed, probably for lack of memory: measure fewer methods at once" if exit_code == -9 else ""
    return BenchWorkerError(f"{name}: its process ended with exit code {exit_code}{hint}.")


@contextmanager
def failures_sent(connection: Connection) -> Iterator[None]:
    """Sends the error that ends its block to the parent, whose `receive` raises it."""
    try:
        yield
    except BaseException as error:  # the process ends behind it
        reason = "".join(traceback.format_exception_only(error)).strip()
        with suppress(OSError):  # the parent has gone
            connection.send(("failed", (reason, "".join(traceback.format_exception(error)))))


def receive(name: str, connection: Connection, process: BaseProcess) -> tuple[str, Any]:
    """Returns what a process sends next.

    Args:
        name: What to call the process in an error.
        connection: The parent's end.
        process: The process.

    Raises:
        BenchWorkerError: If it has failed, or has ended without a word.
    """
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        raise death_of(name, process.exitcode) from error
    if kind == "failed":
        raise failure_of(name, *content)
    return kind, content


def run_together(
    name: str,
    work: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    environment: Mapping[str, str],
    on_step: Callable[[], object] = lambda: None,
) -> list[Any]:
    """Runs a function in several new processes at once.

    Args:
        name: What to call them in an error.
        work: A function of a module. Its first argument is a function to call at the end of each step; the rest
            follows.
        arguments: The further arguments, of each process.
        environment: Variables that the processes have from their start on.
        on_step: Called here for each step that the last process reports.

    Returns:
        What each process returned.

    Raises:
        BenchWorkerError: If a process fails. The others are ended.
    """
    context = multiprocessing.get_context("spawn")  # a forked child would inherit the parent's threads and memory
    processes: dict[Connection, BaseProcess] = {}
    results: dict[Connection, Any] = {}
    try:
        with changed_environment(environment):
            for own in arguments:
                ours, theirs = context.Pipe()
                reports = own is arguments[-1]
                processes[ours] = context.Process(target=_run, args=(theirs, work, own, reports), daemon=True)
                processes[ours].start()
                theirs.close()  # so that the end of the process ends the pipe
        while len(results) < len(processes):
            for connection in wait([connection for connection in processes if connection not in results]):
                assert isinstance(connection, Connection)
                kind, content = receive(name, connection, processes[connection])
                if kind == "step":
                    on_step()
                else:
                    results[connection] = content
        return list(map(results.__getitem__, processes))
    finally:
        for process in processes.values():
            process.join(timeout=GRACE_SECONDS if len(results) == len(processes) else 0)
            process.kill()  # what waits for a process that is gone may not end by itself
            process.join()


def _run(connection: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], reports: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends its processes
    end_with_spawner()
    with failures_sent(connection):

        def on_step() -> None:
            if reports:
                connection.send(("step", None))

        connection.send(("finished", work(on_step, *arguments)))


def one_gpu() -> dict[str, str]:
    """The variable that leaves the first of the machine's GPUs alone: a trainer would use all of them."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


@contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for processes that are started inside: the C library reads some of them before Python runs."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def peak_resident_bytes() -> int:
    """Returns the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: on Linux it starts from the resident memory of the process that spawned this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
