"""Processes that run together: results, environment, failures. This file imports little, since they import it."""

import os
import signal
import time

import pytest

from lopt_hf.bench.processes import BenchWorkerError, run_together


def _tell(on_step, value, variable):
    on_step()
    return value, os.environ[variable]


def _fail(on_step, fails):
    if fails:
        raise KeyError("the reason")
    time.sleep(60)


def _die(on_step):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_return_in_order_and_have_their_environment():
    steps = []
    results = run_together(
        "x", _tell, [(1, "LOPT_TEST"), (2, "LOPT_TEST")], {"LOPT_TEST": "7"}, lambda: steps.append(1)
    )
    assert results == [(1, "7"), (2, "7")]
    assert steps == [1]  # of the last process
    assert "LOPT_TEST" not in os.environ


def test_a_process_that_fails_ends_the_others():
    start = time.monotonic()
    with pytest.raises(BenchWorkerError, match="^PPLL: KeyError: 'the reason'") as caught:
        run_together("PPLL", _fail, [(False,), (True,)], {})
    assert "in _fail" in str(caught.value.__cause__)
    assert time.monotonic() - start < 50


def test_a_process_that_is_killed_is_reported():
    with pytest.raises(BenchWorkerError, match="PPLL: its process ended with exit code -9; .*memory"):
        run_together("PPLL", _die, [()], {})
