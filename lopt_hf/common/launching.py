"""Starting `accelerate launch` and waiting for it, as if it were this command."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from lopt_hf.common.parent import end_with_parent, parent_environment

__all__ = ["HOST_BACKEND", "INTERRUPTED", "LAUNCHER", "ON_THIS_HOST", "run_launcher"]

LAUNCHER = (sys.executable, "-m", "lopt_hf.common.host_launcher")
INTERRUPTED = 130  # the exit status of a command that Ctrl-C has ended
HOST_BACKEND = "lopt_hf_host"
# Options of a launch on one host: torch's own store would listen on all of the host's interfaces
ON_THIS_HOST = ("--rdzv_backend", HOST_BACKEND, "--main_process_port", "0")


def run_launcher(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs a launcher until it ends; its processes end with this one, however this one goes.

    Args:
        command: The launcher's command line.
        environment: Variables that are added to those of this process.

    Returns:
        The launcher's exit status.
    """
    end_with_parent()  # as where a comparison has started this command
    added = {**parent_environment(), **(environment or {})}
    # In a session of its own, so that a signal reaches the launcher once: it ends its processes, if it is let.
    launcher = subprocess.Popen(command, start_new_session=True, env={**os.environ, **added})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: launcher.send_signal(number))
    return launcher.wait()
