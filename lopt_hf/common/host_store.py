"""Key-value stores of `torch.distributed` that no other host can reach: torch's own listen on every interface."""

import socket
from datetime import timedelta

from torch.distributed import TCPStore

__all__ = ["LOOPBACK", "host_store"]

LOOPBACK = "127.0.0.1"
_TIMEOUT = timedelta(seconds=300)  # torch's own default
_BACKLOG = 2048  # as torch's own listener


def host_store(port: int = 0, timeout: timedelta = _TIMEOUT) -> TCPStore:
    """Makes a store that the processes of this host reach by `TCPStore(LOOPBACK, store.port, is_master=False)`.

    Args:
        port: Its port. Default: any that is free.
        timeout: How long a process waits for a key.

    Raises:
        OSError: If the port is taken.
    """
    listener = socket.create_server((LOOPBACK, port), backlog=_BACKLOG)
    port = listener.getsockname()[1]
    # The store closes the socket when it goes
    listen_fd = listener.detach()
    return TCPStore(
        LOOPBACK, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listen_fd
    )
