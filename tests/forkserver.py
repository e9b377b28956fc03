"""Starts processes that are forked from one which has imported everything: within a second, and not ten."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from types import ModuleType, SimpleNamespace

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.forkserver_preload"])


@contextmanager
def forked_instead_of_spawned(module: ModuleType) -> Iterator[None]:
    """Lets a module's processes be forked; they do not have the variables that it sets for them."""
    forkserver.ensure_running()  # before they are set: all later processes would inherit them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda method: CONTEXT))
        yield
