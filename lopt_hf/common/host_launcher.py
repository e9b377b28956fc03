"""`accelerate launch` on one host: its processes meet in a store that no other host can reach, and fail in few words.

Run as a program, it takes the arguments of `accelerate launch`, among them `ON_THIS_HOST` where there is one host.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from subprocess import CalledProcessError

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from lopt_hf.common.host_store import LOOPBACK, host_store
from lopt_hf.common.launching import HOST_BACKEND

__all__ = ["HostRendezvous", "main"]

BAD_INPUT_STATUS = 2
STORE_TIMEOUT = timedelta(minutes=10)  # that of torch's own rendezvous


class HostRendezvous(RendezvousHandler):
    """The rendezvous of a launcher that is the only one.

    Args:
        parameters: What torch's launcher was told; of its settings `port` is read.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._port = int(parameters.get("port", 0))
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        """Returns the backend's name."""
        return HOST_BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Whether the processes use the launcher's store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Makes the store, once: what is started anew goes on with it."""
        self._store = self._store or host_store(self._port, STORE_TIMEOUT)
        address = RendezvousStoreInfo(LOOPBACK, self._store.port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, address)

    def is_closed(self) -> bool:
        """Returns whether nobody may join any more."""
        return False

    def set_closed(self) -> None:
        """Does nothing: there is nobody else to join."""

    def num_nodes_waiting(self) -> int:
        """Returns how many other launchers want to join."""
        return 0

    def get_run_id(self) -> str:
        """Returns the run's name."""
        return self._run_id

    def shutdown(self) -> bool:
        """Ends the rendezvous."""
        return True


def main(argv: Sequence[str] | None = None) -> None:
    """Launches, and ends with status 2 if a process ended so, which has then told what is wrong; 1 if one failed.

    Args:
        argv: Arguments of `accelerate launch`. Default: those of the process.
    """
    rendezvous_handler_registry.register(HOST_BACKEND, HostRendezvous)
    arguments = launch_command_parser().parse_args(argv)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed has said why
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in codes.items():
            if code < 0 and code != -signal.SIGTERM:  # which the launcher itself sends to the others
                print(f"lopt-hf: process {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        sys.exit(BAD_INPUT_STATUS if BAD_INPUT_STATUS in codes.values() else 1)
    except SignalException as error:
        sys.exit(128 + int(error.sigval))
    except CalledProcessError as error:  # of one process
        sys.exit(BAD_INPUT_STATUS if error.returncode == BAD_INPUT_STATUS else 1)
    except (ValueError, OSError, ImportError) as error:  # of the configuration
        print(f"lopt-hf: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT_STATUS)


if __name__ == "__main__":
    main()
