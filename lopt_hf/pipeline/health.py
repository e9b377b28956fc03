"""Who is still there: every process of the pipeline tells that it is alive, and hears of a failure anywhere."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping

import torch.distributed as dist

__all__ = ["PeerMonitor", "PipelineError"]

BEAT_SECONDS = 1.0
GRACE_SECONDS = 5.0  # after a failure is known, for the main thread to end by itself
FAILURE = "failure"
DONE = "done"


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
    """

    def __init__(self, store: dist.Store, rank: int, peers: Mapping[int, str], timeout: float) -> None:
        self.rank = rank
        self.peers = dict(peers)
        self.timeout = timeout
        self.failure: str | None = None
        # A connection of its own: the main thread may be waiting for an answer on the other.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._failed_at = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._contact = time.monotonic()
        for target in (self._beat, self._guard):
            threading.Thread(target=target, name=f"lopt_hf{target.__name__}", daemon=True).start()

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
            reason = self._store.compare_set(FAILURE, "", reason).decode() or reason
        self._note(reason)
        return PipelineError(reason)

    def lost(self, peer: int, what: str) -> PipelineError:
        """As `fail`, for a peer whose connection broke, unless that peer has said itself why it ended."""
        self._stopped.wait(0.2)
        return self.fail(f"{self.peers.get(peer, f'rank {peer}')} is gone: {what}")

    def finish(self) -> None:
        """Says good-bye: from now on silence means that this process is done."""
        self._stopped.set()
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
        seen: dict[int, tuple[bytes, float]] = {}
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
            for peer, value in zip(present, values, strict=True):
                if peer not in seen or seen[peer][0] != value:
                    seen[peer] = (value, now)
                elif value != DONE.encode() and now - seen[peer][1] > self.timeout:
                    self.fail(f"{self.peers[peer]} has given no sign of life for {self.timeout:.0f} s")
            beat += 1
            self._stopped.wait(BEAT_SECONDS)

    def _guard(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            if self.failure is None and now - self._contact > self.timeout:
                self._note(
                    f"no contact with the rendezvous store for {self.timeout:.0f} s: its host, or the link to it, is "
                    "down"
                )
            if self.failure is not None and now - self._failed_at > GRACE_SECONDS:
                os._exit(1)
