"""What processes listen to, looked at while they run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address

import psutil

Sockets = set[tuple[int, str, int]]


def listening(process: psutil.Process) -> Sockets:
    """Process, address and port of what a process and those that it started listen to."""
    found: Sockets = set()
    with suppress(psutil.Error):
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                found |= {
                    (each.pid, *connection.laddr)
                    for connection in each.net_connections("tcp")
                    if connection.status == psutil.CONN_LISTEN
                }
    return found


@contextmanager
def watched(process: psutil.Process) -> Iterator[Sockets]:
    """What is listened to within the block, besides what was before."""
    before, found, ended = listening(process), Sockets(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.3):
            found.update(listening(process) - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def assert_on_loopback(found: Sockets, processes: int) -> None:
    assert len({process for process, _, _ in found}) >= processes
    assert not [address for _, address, _ in found if not ip_address(address).is_loopback], found
