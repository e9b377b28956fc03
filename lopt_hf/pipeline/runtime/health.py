"""Heartbeats of the pipeline's processes, and the first failure anywhere, which all of them name."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping

import torch.distributed as dist

__all__ = [
    "BAD_INPUT_STATUS",
    "PeerMonitor",
    "PipelineError",
    "describe_error",
    "failure_status",
    "report_bad_input",
    "report_failure",
    "report_termination",
    "telling_of_bad_input",
]

BEAT_SECONDS = 1.0
GRACE_SECONDS = 3.0  # after a failure is known, for the main thread to end by itself
TERMINATION_SECONDS = 2.0  # after SIGTERM, to learn of a failure that is the launcher's reason; it waits 30 s
POLL_SECONDS = 0.02
FAILURE = "failure"
BAD_INPUT = "bad input"
BAD_INPUT_STATUS = 2
DONE = "done"
# Raised with a message for the user; the others' are of little use without their type and the place
_FOR_USERS = (ValueError, OSError, ImportError, FloatingPointError)


class PipelineError(RuntimeError):
    """The pipeline cannot go on; the message names the step and the rank that is the cause."""


class PeerMonitor:
    """Watches the neighbours of one process, and stops the process if the pipeline is broken.

    A process that is killed closes its connections, which its neighbours see at once; a host whose link is cut does
    not, so each process also counts up in the rendezvous store, and its neighbours look whether it does. The first
    failure is written to the store, so that all processes name the same cause.

    The message is printed when a failure is noticed; `check`, called wherever the main thread waits, raises it. Where
    the main thread does not come to that (it hangs in a collective), the process is ended after a grace period.

    Args:
        store: The rendezvous store of the run.
        rank: The global rank of this process.
        peers: What to call the processes that are watched, by global rank.
        timeout: Seconds without a sign of life after which a peer, or the store, counts as lost.
        start_timeout: Seconds that a peer may take to give its first one.
    """

    def __init__(
        self, store: dist.Store, rank: int, peers: Mapping[int, str], timeout: float, start_timeout: float = math.inf
    ) -> None:
        self.rank = rank
        self.peers = dict(peers)
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.failure: str | None = None
        # A connection of its own: the main thread may be waiting for an answer on the other.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._failed_at = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._contact = time.monotonic()
        self._threads = [
            threading.Thread(target=target, name=f"lopt_hf{target.__name__}", daemon=True)
            for target in (self._beat, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raises `PipelineError` if a failure is known."""
        if self.failure is not None:
            raise PipelineError(self.failure)

    def fail(self, reason: str) -> PipelineError:
        """Tells all processes that the pipeline is broken; the first reason counts.

        Args:
            reason: What happened, naming the rank.

        Returns:
            The error to raise.
        """
        with contextlib.suppress(RuntimeError):  # the store may be what is lost
            reason = report_failure(self._store, reason)
        self._note(reason)
        return PipelineError(reason)

    def lost(self, peer: int, what: str) -> PipelineError:
        """As `fail`, for a peer whose connection broke; one that could say why has done so before."""
        # At once: the launcher ends this process too as soon as it notices, and the next would be blamed.
        return self.fail(f"{self.peers.get(peer, f'rank {peer}')} is gone: {what}")

    def explain(self, error: Exception, name: str, advice: str = "") -> PipelineError:
        """As `fail`, for an error of the main thread, which may be this process's own or that a collective broke.

        Of one that nobody wrote for the user the traceback is printed too, to this process's output.

        Args:
            error: What was raised.
            name: What to call this process.
            advice: What to say if a connection broke and no process is missing.
        """
        if not isinstance(error, RuntimeError) or not _is_of_a_connection(error):
            if not isinstance(error, _FOR_USERS):
                traceback.print_exception(error)
            return self.fail(f"{name} failed: {describe_error(error)}")
        # The backend does not say whose; the one who is silent from now on is it.
        end = time.monotonic() + self.timeout + GRACE_SECONDS
        while self.failure is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return self.fail(f"{name} lost a connection: {str(error).splitlines()[0]}{advice}")

    def wait_for(self, store: dist.Store, key: str) -> str:
        """Waits until a store has a key, and returns what it holds.

        Raises:
            PipelineError: If the pipeline is broken, so that it may never come.
        """
        while not store.check([key]):
            self.check()
            time.sleep(POLL_SECONDS)
        return store.get(key).decode()

    def barrier(self, store: dist.Store, name: str, world_size: int) -> None:
        """Waits until all processes have come to this point; a collective would not tell who is missing.

        Args:
            store: The store that all processes share.
            name: Name of the point, unique in a run.
            world_size: Number of processes.

        Raises:
            PipelineError: If the pipeline is broken.
        """
        if store.add(f"barrier/{name}", 1) == world_size:
            store.set(f"barrier/{name}/all", "")
        self.wait_for(store, f"barrier/{name}/all")

    def finish(self) -> None:
        """Says good-bye: from now on silence means that this process is done."""
        self._stopped.set()
        # A thread that is in the store's C++ code while the interpreter ends would abort the process.
        for thread in self._threads:
            thread.join(self.timeout)
        with contextlib.suppress(RuntimeError):
            self._store.set(self._key(self.rank), DONE)

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat/{rank}"

    def _note(self, reason: str) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = reason
            self._failed_at = time.monotonic()
        print(f"lopt-hf pipeline: rank {self.rank} stops: {reason}", file=sys.stderr, flush=True)

    def _beat(self) -> None:
        last = dict.fromkeys(self.peers, (b"", 0.0))  # what a peer wrote, and for how long it has been the same
        looked = time.monotonic()
        beat = 0
        while not self._stopped.is_set() and self.failure is None:
            try:
                self._store.set(self._key(self.rank), str(beat))
                reason = self._store.get(FAILURE).decode() if self._store.check([FAILURE]) else ""
                present = [peer for peer in self.peers if self._store.check([self._key(peer)])]
                values = self._store.multi_get([self._key(peer) for peer in present]) if present else []
            except RuntimeError:
                return  # `_guard` notices the silence, or the main thread is done
            self._contact = now = time.monotonic()
            if reason:
                self._note(reason)
            # While this process did not run (the machine slept, or was stopped), the others may not have either.
            passed, looked = min(now - looked, 2 * BEAT_SECONDS), now
            written = dict(zip(present, values, strict=True))
            for peer, (value, silence) in last.items():
                new = written.get(peer, b"")
                last[peer] = (new, silence + passed if new == value else 0.0)
                self._judge(peer, *last[peer])
            beat += 1
            self._stopped.wait(BEAT_SECONDS)

    def _judge(self, peer: int, value: bytes, silence: float) -> None:
        if not value and silence > self.start_timeout:
            self.fail(f"{self.peers[peer]} did not start within {self.start_timeout:.0f} s; see its own output")
        elif value not in (b"", DONE.encode()) and silence > self.timeout:
            self.fail(f"{self.peers[peer]} has given no sign of life for {self.timeout:.0f} s")

    def _guard(self) -> None:
        contact, silence = self._contact, 0.0
        while not self._stopped.wait(BEAT_SECONDS):
            silence = silence + BEAT_SECONDS if contact == self._contact else 0.0  # as above, not by the clock
            contact = self._contact
            if self.failure is None and silence > self.timeout:
                self._note(
                    f"no contact with the rendezvous store for {self.timeout:.0f} s: its host, or the link to it, is "
                    "down"
                )
            if self.failure is not None and time.monotonic() - self._failed_at > GRACE_SECONDS:
                os._exit(1)


def report_failure(store: dist.Store, reason: str) -> str:
    """Tells all processes that the pipeline is broken.

    Args:
        store: The store of the run.
        reason: What happened, naming the rank.

    Returns:
        The reason that counts: the first.
    """
    return store.compare_set(FAILURE, "", reason).decode() or reason


def describe_error(error: Exception) -> str:
    """Returns what a line says of an error: its message, with its type where that was not written for the user."""
    kind, message = type(error).__name__, str(error)
    if not message:
        return kind
    return message if isinstance(error, _FOR_USERS) else f"{message} ({kind})"


def report_bad_input(store: dist.Store) -> None:
    """Tells all processes that the failure which is told next is of what the user gave."""
    store.set(BAD_INPUT, "")


@contextlib.contextmanager
def telling_of_bad_input(store: dist.Store) -> Iterator[None]:
    """Tells all processes, where the block raises a `ValueError`, that what the user gave is its cause."""
    try:
        yield
    except ValueError:
        report_bad_input(store)
        raise


def failure_status(store: dist.Store) -> int:
    """Returns the status with which a process ends after a failure: 2 where what the user gave was the cause."""
    with contextlib.suppress(RuntimeError):  # the store may be what is lost
        if store.check([BAD_INPUT]):
            return BAD_INPUT_STATUS
    return 1


def report_termination(monitor: PeerMonitor, name: str) -> None:
    """Lets the process say why before SIGTERM ends it: the launcher ends all of a host's when one of them failed.

    A process that went without a word would be blamed by those on other hosts. It must be called from the main thread,
    which need not be free when the signal comes.

    Args:
        monitor: What knows the failure, or soon will.
        name: What to call this process.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_termination)

    def watch() -> None:
        while reader.recv(1)[0] != signal.SIGTERM:
            continue
        end = time.monotonic() + TERMINATION_SECONDS
        while monitor.failure is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if monitor.failure is None:
            monitor.fail(f"{name} was ended from outside (SIGTERM)")
        writer.close()
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="lopt_hf termination", daemon=True).start()


def _forget_termination() -> None:
    """A worker process of the data loader is ended by its parent, with the same signal."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Whether a collective broke because of another process; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
