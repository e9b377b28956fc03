"""The simulated schedules against real ones, in real processes.

A stage's forward and backward sleep for the given times instead of computing, so that any number of stages truly runs
in parallel on a few cores. The end-to-end schedules are those of `torch.distributed.pipelining`; local learning runs
over `torch.distributed` point to point, with its receives posted ahead.
"""

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

from lopt_hf.pipeline.schedule import ScheduleResult, Workload

__all__ = ["measure_schedules"]

MEASURED_STEPS = 3
BYTES_PER_VALUE = 4
TORCH_SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}
SEVERAL_STAGES = ("interleaved", "zero-bubble")  # these take a list


def measure_schedules(results: Sequence[ScheduleResult]) -> list[float]:
    """Runs schedules with sleeping stages, one process for each stage.

    Args:
        results: What was simulated; each is run with its own workload.

    Returns:
        The time of an optimizer step of each, in seconds.

    Raises:
        ValueError: If a workload cannot be run: its stages share cores, or torch does not run the schedule with it.
        torch.multiprocessing.ProcessRaisedException: If a process fails; its traceback is in the message.
    """
    for result in results:
        _check(result.schedule, result.workload)
    seconds: dict[int, float] = {}
    for ranks in sorted({result.workload.times.num_stages for result in results}):
        chosen = [index for index, result in enumerate(results) if result.workload.times.num_stages == ranks]
        seconds |= zip(
            chosen, _launch(ranks, [(results[i].schedule, results[i].workload) for i in chosen]), strict=True
        )
    return [seconds[index] for index in range(len(results))]


def _check(schedule: str, workload: Workload) -> None:
    stages = workload.times.num_stages
    if workload.cores is not None:
        raise ValueError(f"cores={workload.cores}: sleeping stages take no core; leave it out to validate.")
    if stages < 2:
        raise ValueError(f"stages={stages}: a pipeline that can be run has at least 2.")
    if schedule == "1f1b" and workload.microbatches < stages:
        raise ValueError(
            f"microbatches={workload.microbatches}: torch's Schedule1F1B needs at least as many as stages={stages}."
        )


def _launch(ranks: int, cases: list[tuple[str, Workload]]) -> list[float]:
    """Runs the cases one after the other in one set of processes."""
    with tempfile.TemporaryDirectory(prefix="lopt_schedules_") as folder:
        mp.spawn(_work, args=(ranks, Path(folder), cases), nprocs=ranks)
        return json.loads((Path(folder) / "seconds.json").read_text())


def _work(rank: int, ranks: int, folder: Path, cases: list[tuple[str, Workload]]) -> None:
    """One process: runs every case; the first writes their step times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=ranks)
    seconds = [_measure(schedule, workload, rank) for schedule, workload in cases]
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def _measure(schedule: str, workload: Workload, rank: int) -> float:
    """Step time of one case: from the end of the first step to the end of the last, over all ranks."""
    run_step = _LocalStage(workload, rank).step if schedule == "ppll" else _end_to_end_step(schedule, workload, rank)
    dist.barrier()
    ends = []
    for _ in range(1 + MEASURED_STEPS):
        run_step()
        time.sleep(workload.times.optimizer[rank])
        ends.append(time.perf_counter())  # one clock for all processes of a machine
    all_ends: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(all_ends, ends)
    return (max(each[-1] for each in all_ends) - max(each[0] for each in all_ends)) / MEASURED_STEPS


def _values(workload: Workload) -> int:
    """Length of a micro-batch's hidden states, which are one row of fp32 values here."""
    return max(1, round(workload.message_bytes / BYTES_PER_VALUE))


class _SleepingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, forward_seconds: float, backward_seconds: float) -> torch.Tensor:
        ctx.backward_seconds = backward_seconds
        time.sleep(forward_seconds)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class _SleepingStage(nn.Module):
    """A stage with one weight, so that there is a backward on the first stage, too."""

    def __init__(self, forward_seconds: float, backward_seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = forward_seconds, backward_seconds

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _SleepingFunction.apply(hidden + self.weight, *self.seconds)


def _end_to_end_step(schedule: str, workload: Workload, rank: int) -> Callable[[], Any]:
    """A step of one of torch's schedules, without the optimizer's."""
    ranks = workload.times.num_stages
    stages = _stages(schedule, workload, rank)
    runner = TORCH_SCHEDULES[schedule](
        stages if schedule in SEVERAL_STAGES else stages[0],
        n_microbatches=workload.microbatches,
        loss_fn=lambda output, target: output.mean(),
    )
    inputs_MN = torch.zeros(workload.microbatches, _values(workload))
    arguments = (inputs_MN,) if rank == 0 else ()
    targets = {"target": torch.zeros(workload.microbatches)} if rank == ranks - 1 else {}
    return lambda: runner.step(*arguments, **targets, return_outputs=False)


def _stages(schedule: str, workload: Workload, rank: int) -> list[PipelineStage]:
    times, ranks = workload.times, workload.times.num_stages
    chunks = workload.virtual_stages if schedule == "interleaved" else 1
    weight = times.backward[rank] * workload.weight_share if schedule == "zero-bubble" else 0.0
    module = _SleepingStage(times.forward[rank] / chunks, (times.backward[rank] - weight) / chunks)
    puts_off = (lambda: lambda: time.sleep(weight)) if schedule == "zero-bubble" else None
    return [
        PipelineStage(module, chunk * ranks + rank, chunks * ranks, torch.device("cpu"), dw_builder=puts_off)
        for chunk in range(chunks)
    ]


class _LocalStage:
    """A stage of local learning: it receives, computes forward, sends, and learns."""

    def __init__(self, workload: Workload, rank: int) -> None:
        self.workload, self.rank = workload, rank
        self.to_receive = (1 + MEASURED_STEPS) * workload.microbatches if rank > 0 else 0
        self.receives: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self.sends: deque[tuple[dist.Work, torch.Tensor]] = deque()
        for _ in range(workload.channel_depth + 1):
            self._post_receive()

    def step(self) -> None:
        times, rank = self.workload.times, self.rank
        for _ in range(self.workload.microbatches):
            hidden_1N = self._receive()
            time.sleep(times.forward[rank])
            self._send(hidden_1N)
            time.sleep(times.local[rank])
            time.sleep(times.backward[rank])
        if not self.to_receive and not self.receives:
            self._finish_sends(0)

    def _post_receive(self) -> None:
        if self.to_receive:
            self.to_receive -= 1
            hidden_1N = torch.empty(1, _values(self.workload))
            work = dist.irecv(hidden_1N, self.rank - 1)
            assert work is not None  # the types of torch: `None` on ranks outside the group
            self.receives.append((work, hidden_1N))

    def _receive(self) -> torch.Tensor:
        if self.rank == 0:
            return torch.zeros(1, _values(self.workload))
        work, hidden_1N = self.receives.popleft()
        work.wait()
        self._post_receive()
        return hidden_1N

    def _send(self, hidden_1N: torch.Tensor) -> None:
        if self.rank == self.workload.times.num_stages - 1:
            return
        self._finish_sends(self.workload.channel_depth)
        work = dist.isend(hidden_1N, self.rank + 1)
        assert work is not None
        self.sends.append((work, hidden_1N))

    def _finish_sends(self, left: int) -> None:
        while len(self.sends) > left:
            self.sends.popleft()[0].wait()
