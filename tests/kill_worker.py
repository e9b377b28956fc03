"""Runs a command of `lopt-hf` in a process that `test_kills.py` kills; forked, so that it need not import torch."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tests.conftest  # noqa: F401  (offline, one thread)
from tests.forkserver import CONTEXT


def run_command(arguments: Sequence[str], log: Path) -> None:
    """Does what `lopt-hf` does, in a session of its own and with its output in a file."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdin = open(os.devnull)
    if arguments[0] in ("compare", "retention"):
        _read_own_tasks_only()
    if arguments[0] == "compare":
        _fork_its_runs()
    from lopt_hf import cli

    cli.main(arguments)


def _read_own_tasks_only() -> None:
    """Leaves lm-eval's tasks out, whose index takes some seconds."""
    from lm_eval.tasks import TaskManager

    from lopt_hf.retention import suites

    def manager(include_path: Any = None, include_defaults: bool = True) -> Any:
        return TaskManager(include_path=include_path, include_defaults=False)

    suites.TaskManager = manager  # type: ignore[misc, assignment]


def _fork_its_runs() -> None:
    """Lets a grid's runs be forked where it would start Python; each watches for its parent's end as it would then."""
    from lopt_hf.compare import grid_training

    def run(command: Sequence[str], env: dict[str, str], stdout: Any, **_: Any) -> subprocess.CompletedProcess:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for stream in (1, 2):
                os.dup2(stdout.fileno(), stream)
            os.environ |= env
            _end_after(command)
        _, status = os.waitpid(pid, 0)
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status))

    grid_training.subprocess = SimpleNamespace(  # type: ignore[assignment]
        run=run, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )


def _end_after(command: Sequence[str]) -> None:
    from lopt_hf import cli

    status = 1
    try:
        cli.main([command[2].rpartition(".")[2], *command[3:]])
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(arguments: Sequence[str], log: Path) -> Any:
    """Starts a command; the process has `kill`, `join` and `exitcode`."""
    process = CONTEXT.Process(target=run_command, args=(list(arguments), log))
    process.start()
    return process


def warm_up() -> None:
    """Waits until processes can be forked: the first waits for all imports."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()
