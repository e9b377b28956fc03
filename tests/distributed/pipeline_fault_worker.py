"""One process of a pipeline in which something goes wrong on purpose; started by `pipeline_processes.py`."""

import importlib
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (imported before the processes are forked)

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf.scripts import pipeline


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where.

    Attributes:
        target: Dotted name of the function that is wrapped.
        call: At which of its calls, from 1; 0 is all of them.
        action: Name of one of `ACTIONS`.
        ranks: Where; default: on every rank.
        after: Whether it happens after the call, whose result the action is given too.
    """

    target: str
    call: int = 1
    action: str = "kill"
    ranks: tuple[int, ...] = ()
    after: bool = False


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def kill_soon(*_: Any) -> None:
    threading.Timer(0.5, kill).start()


def pause(*_: Any) -> None:
    time.sleep(1.5)


def raise_error(*_: Any) -> None:
    raise RuntimeError("the test's own error")


def fill_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def make_nan(module: torch.nn.Module, *_: Any) -> None:
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))


def slow_down(*_: Any) -> None:
    time.sleep(0.01)


_messages: list[weakref.ref[Any]] = []


def note_memory(*args: Any) -> None:
    """Notes how many of the messages that were made are alive, and the resident bytes of the process."""
    _messages[:] = [message for message in (*_messages, weakref.ref(args[-1])) if message() is not None]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    os.write(1, f"memory: {len(_messages)} {pages * os.sysconf('SC_PAGE_SIZE')}\n".encode())  # two threads write


ACTIONS: dict[str, Callable[..., None]] = {
    action.__name__: action
    for action in (kill, kill_soon, pause, raise_error, fill_disk, make_nan, slow_down, note_memory)
}


def install(fault: Fault) -> None:
    owner_name, _, name = fault.target.rpartition(".")
    owner = _resolve(owner_name)
    original = getattr(owner, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        strikes = fault.call in (0, calls)
        if strikes and not fault.after:
            ACTIONS[fault.action](*args)
        result = original(*args, **kwargs)
        if strikes and fault.after:
            ACTIONS[fault.action](*args, result)
        return result

    setattr(owner, name, wrapped)


def _resolve(name: str) -> Any:
    """A module, or a class in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def become_rank(rank: int, environment: dict[str, str], log: Path) -> None:
    """Makes a forked process what a launched one is, with its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdin = open(os.devnull)
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def run_rank(rank: int, environment: dict[str, str], log: Path, arguments: Sequence[str], faults: list[Fault]) -> None:
    """What a launched process does: `python -m lopt_hf.scripts.pipeline`, with the faults of its rank."""
    become_rank(rank, environment, log)
    for fault in faults:
        if not fault.ranks or rank in fault.ranks:
            install(fault)
    pipeline.main(arguments)
