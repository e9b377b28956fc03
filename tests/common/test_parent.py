"""A process that was started by a command ends with it, also where another process stands between the two."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lopt_hf.common.parent import end_with_spawner

CHILD = (
    "import time; from lopt_hf.common.parent import end_with_parent; end_with_parent(); print(1, flush=True); "
    "time.sleep(99)"
)
BETWEEN = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
LAUNCHING = (
    f"import sys; from lopt_hf.common.launching import run_launcher; run_launcher([sys.executable, '-c', {CHILD!r}])"
)
PARENT = """
import os, subprocess, sys
from lopt_hf.common.parent import parent_environment
subprocess.run([sys.executable, "-c", {code!r}], env={{**os.environ, **parent_environment()}})
"""


@pytest.mark.parametrize(
    "code", [CHILD, BETWEEN, LAUNCHING], ids=["its child", "its child's child", "what its child has launched"]
)
def test_a_killed_command_takes_what_it_started_along(code):
    command = [sys.executable, "-c", PARENT.format(code=code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout.readline() == b"1\n"  # the innermost runs
        started = psutil.Process(parent.pid).children(recursive=True)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(p.is_running() for p in started):
        time.sleep(0.1)
    assert started and not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started)


def spawned() -> None:
    end_with_spawner()
    print(1, flush=True)
    time.sleep(99)


def test_a_killed_command_takes_what_it_spawned_along():
    code = (
        "from multiprocessing import get_context\n"
        "from tests.common.test_parent import spawned\n"
        "process = get_context('spawn').Process(target=spawned)\n"
        "process.start()\n"
        "process.join()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout.readline() == b"1\n"
        started = psutil.Process(parent.pid).children(recursive=True)
        os.kill(parent.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert started and not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_process_that_nobody_started_goes_on():
    code = CHILD.replace("time.sleep(99)", "time.sleep(3); print(2)")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1", "2"]
