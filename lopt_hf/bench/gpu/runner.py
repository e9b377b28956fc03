"""Runs the parts of a check one after another, each in a process of its own that a time limit can end."""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from lopt_hf.bench.gpu.parts import Case, Outcome, Part
from lopt_hf.bench.gpu.worker import work
from lopt_hf.bench.processes import GRACE_SECONDS, changed_environment, death_of

__all__ = ["run_parts"]

Report = Callable[[Outcome], None]


def run_parts(parts: Sequence[Part], limit: float, log: Path, report: Report) -> None:
    """Runs parts, each in a process of its own.

    A process imports while the one before still measures. One that dies loses the case it was at: another goes on with
    the next.

    Args:
        parts: What to run, in order; those in the background start when the first of the others has ended.
        limit: Seconds for all of them together.
        log: File that gets what the processes print.
        report: Called for every case, as soon as it is known what has become of it.
    """
    deadline = monotonic() + limit
    with TemporaryDirectory(prefix="lopt_gpu_", ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        stack.enter_context(_terminated_as_interrupted())

        def start(part: Part, first: int = 0) -> _Process:
            return stack.enter_context(_Process(part, first, folder, log))

        foreground = deque(part for part in parts if not part.in_background)
        background = [part for part in parts if part.in_background]
        beside: list[_Run] = []
        prepared = start(foreground[0]) if foreground else None
        while foreground:
            part = foreground.popleft()
            assert prepared is not None
            run = _Run(part, prepared, start, deadline, report)
            prepared = start(foreground[0]) if foreground else None
            _until_over(run, beside)
            while background:
                part = background.pop(0)
                beside.append(_Run(part, start(part), start, deadline, report))
        while beside:
            _until_over(beside[0], beside[1:])
            beside.pop(0)


def _until_over(run: "_Run", beside: "Sequence[_Run]") -> None:
    while not run.is_over:
        active = [run, *(other for other in beside if not other.is_over)]
        timeout = max(0.0, min(each.deadline for each in active) - monotonic())
        ready = wait([each.connection for each in active], timeout)
        for each in active:
            each.advance(each.connection in ready)


class _Run:
    """A part on its way: which case it is at, and until when it may go on."""

    def __init__(
        self, part: Part, process: "_Process", start: "Callable[[Part, int], _Process]", latest: float, report: Report
    ) -> None:
        self.part = part
        self._latest = latest
        self.deadline = self._deadline()
        self.is_over = False
        self._process, self._start, self._report = process, start, report
        self._next = 0
        self._begun: float | None = None
        if self.deadline <= monotonic():
            self._give_up()

    def _deadline(self) -> float:
        return min(monotonic() + self.part.limit, self._latest)

    @property
    def connection(self) -> Connection:
        return self._process.connection

    def advance(self, is_ready: bool) -> None:
        """Takes the next message of the process, if there is one, or ends it if its time is over."""
        if is_ready:
            self._take()
        elif monotonic() >= self.deadline:
            self._give_up()

    def _take(self) -> None:
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._lose(self._process.death)
            return
        if kind == "ready":
            if self._next == 0:  # its imports are not the part's time; those of a process after it are
                self.deadline = self._deadline()
            self._process.go()
        elif kind == "begun":
            self._begun = monotonic()
        elif kind == "ended":
            self._next, outcome = content[0] + 1, content[1]
            self._begun = None
            self._report(outcome)
        elif kind == "failed":
            self._lose(content[0])
        else:
            self._end()

    def _lose(self, reason: str) -> None:
        """The process has died: the case that it was at has failed, and a new one goes on with the next."""
        case = self.part.cases[self._next]
        self._report(Outcome(self.part.name, case.name, "failed", self._elapsed, reason=reason))
        self._begun = None
        self._next += 1
        self._process.end()
        if self._next == len(self.part.cases):
            self.is_over = True
        else:
            self._process = self._start(self.part, self._next)

    def _give_up(self) -> None:
        self._process.end()
        cases: Sequence[Case] = self.part.cases[self._next :]
        for index, case in enumerate(cases):
            seconds = self._elapsed if index == 0 else 0.0
            reason = f"ended at its limit, after {seconds:.0f} s of this case" if seconds else "no time was left"
            self._report(Outcome(self.part.name, case.name, "not reached", seconds, reason=reason))
        self.is_over = True

    def _end(self) -> None:
        self._process.end(GRACE_SECONDS)  # it has left the GPU when the next part starts
        self.is_over = True

    @property
    def _elapsed(self) -> float:
        return 0.0 if self._begun is None else monotonic() - self._begun


class _Process:
    """The parent's end of a part's process, which ends with the `with` block."""

    def __init__(self, part: Part, first: int, folder: str, log: Path) -> None:
        self._name = part.name
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, part, first, folder, str(log)), daemon=False)
        with changed_environment(dict(part.environment)):
            self._process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def go(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # its end is read next
            self.connection.send("go")

    @property
    def death(self) -> str:
        self._process.join()
        return str(death_of(self._name, self._process.exitcode))

    def end(self, grace: float = 0.0) -> None:
        """Ends the process, and those that it has started, unless it ends by itself within `grace` seconds."""
        self._process.join(timeout=grace)
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended, or it has made no group yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.connection.close()

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.connection.closed:
            self.end()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Lets SIGTERM, which `timeout` sends, end the block as Ctrl-C does: the processes are ended with it."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
