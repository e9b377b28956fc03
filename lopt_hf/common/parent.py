"""Processes that end when the command that has started them is gone, however it went.

A command that is killed (by the system, when memory runs out) cannot end what it has started. It would train on
unseen, and race the run that is resumed in its place. Between the two stands `accelerate launch`, through which an
environment variable passes, and neither an inherited pipe nor a signal at the parent's death.
"""

import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.process import BaseProcess

import psutil

__all__ = ["end_with_parent", "end_with_spawner", "parent_environment"]

_VARIABLE = "LOPT_HF_PARENT"
_SECONDS = 1.0  # between two looks


def parent_environment() -> dict[str, str]:
    """Returns what the environment of a process needs that is to end with this one."""
    return {_VARIABLE: f"{os.getpid()} {psutil.Process().create_time()}"}


def end_with_parent() -> None:
    """Lets this process end when the command is gone that has started it with `parent_environment`, if one has."""
    if _VARIABLE in os.environ:
        number, created = os.environ[_VARIABLE].split()
        threading.Thread(target=_watch, args=(int(number), float(created)), daemon=True, name="parent").start()


def end_with_spawner() -> None:
    """Lets this process end when the one is gone that has started it by `multiprocessing`, if one has."""
    spawner = multiprocessing.parent_process()
    if spawner is not None:
        threading.Thread(target=_join, args=(spawner,), daemon=True, name="spawner").start()


def _watch(number: int, created: float) -> None:
    while _is_alive(number, created):
        time.sleep(_SECONDS)
    _end(number)


def _join(spawner: BaseProcess) -> None:
    spawner.join()
    _end(spawner.pid)


def _end(number: int | None) -> None:
    print(f"lopt-hf: the command that started this process ({number}) is gone; this ends, too.", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _is_alive(number: int, created: float) -> bool:
    try:
        process = psutil.Process(number)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
