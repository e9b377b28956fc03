"""The process of one part: imports while others measure, waits for its turn, runs its cases, reports each."""

import gc
import importlib.util
import os
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

from lopt_hf.bench.gpu.parts import Case, Outcome, Part
from lopt_hf.bench.processes import failures_sent
from lopt_hf.common.parent import end_with_spawner

__all__ = ["clean", "work"]


def work(connection: Connection, part: Part, first: int, folder: str, log: str) -> None:
    """Runs the cases of a part from the one with index `first` on.

    The parent is told `("ready", None)` after the imports, and waited for; then, for each case, `("begun", index)` and
    `("ended", (index, outcome))`.
    """
    os.setsid()  # the parent ends a group of processes: a case may start some
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_spawner()
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    with failures_sent(connection), suppress(EOFError):  # the parent has gone: nobody waits for the results
        _import(part.threads)
        connection.send(("ready", None))
        connection.recv()
        for index, case in enumerate(part.cases[first:], start=first):
            connection.send(("begun", index))
            connection.send(("ended", (index, _run(case, part, Path(folder)))))
        connection.send(("finished", None))


def _import(threads: int | None) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched, and TRL reports no run
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    import lopt_hf.bench.gpu.training
    from lopt_hf.bench.training import silence

    silence()
    lopt_hf.bench.gpu.training.import_trainers()
    if threads is not None:
        torch.set_num_threads(threads)
    gc.collect()
    gc.freeze()  # collecting goes through what a case has made, not through what the imports have


def _run(case: Case, part: Part, folder: Path) -> Outcome:
    print(f"--- {part.name}: {case.name}", file=sys.stderr, flush=True)
    missing = [need for need in case.needs if not _is_there(need)]
    if missing:
        what = " and ".join("a CUDA device" if need == "cuda" else need for need in missing)
        return Outcome(part.name, case.name, "skipped", reason=f"needs {what}")
    start = perf_counter()
    left_over = clean()
    try:
        values = {**case.run(folder), "left_over_bytes": left_over}
    except BaseException as error:
        seconds = perf_counter() - start
        # As text only: what the frames refer to may hold the GPU's memory.
        reason = "".join(traceback.format_exception_only(error)).strip().splitlines()[0][:400]
        trace = "".join(traceback.format_exception(error))
        traceback.clear_frames(error.__traceback__)
        print(trace, file=sys.stderr, flush=True)
        return Outcome(part.name, case.name, "failed", seconds, reason=reason, trace=trace)
    return Outcome(part.name, case.name, "done", perf_counter() - start, values)


def _is_there(need: str) -> bool:
    import torch

    return torch.cuda.is_available() if need == "cuda" else importlib.util.find_spec(need) is not None


def clean() -> int:
    """Frees what the case before has left; returns the bytes on the GPU that cannot be."""
    import torch

    gc.collect()
    torch.compiler.reset()  # what was compiled for another model counts towards a limit
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    return torch.cuda.memory_allocated()
