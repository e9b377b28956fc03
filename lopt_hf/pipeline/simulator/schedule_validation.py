"""The simulated schedules against real ones, in real processes.

A stage's forward and backward sleep for the given times instead of computing, so that any number of stages truly runs
in parallel on a few cores. The end-to-end schedules are those of `torch.distributed.pipelining`; local learning runs
over the channels of the pipeline.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble
from torch.multiprocessing.spawn import ProcessException

from lopt_hf.common.distributed import new_group
from lopt_hf.common.host_store import LOOPBACK, host_store
from lopt_hf.common.parent import end_with_spawner
from lopt_hf.pipeline.runtime.channel import BatchId, ReceivingChannel, SendingChannel
from lopt_hf.pipeline.runtime.health import PeerMonitor
from lopt_hf.pipeline.simulator.schedule import Workload
from lopt_hf.pipeline.simulator.schedule_orders import rounds_of

__all__ = ["ScheduleRunError", "check_measurable", "measure_schedules"]

PEER_TIMEOUT_SECONDS = 60.0  # importing torch in several processes on a busy machine takes a while
MAX_PROCESSES = 16  # ours: each takes about 300 MB for torch alone
MEASURED_STEPS = 3
BYTES_PER_VALUE = 4
TORCH_SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}
SEVERAL_STAGES = ("interleaved", "zero-bubble")  # these take a list


class ScheduleRunError(RuntimeError):
    """A process of a real run failed; the message is the last line of its traceback, `__cause__` has all of it."""


def measure_schedules(cases: Sequence[tuple[str, Workload]]) -> list[float]:
    """Runs schedules with sleeping stages, one process for each stage.

    Args:
        cases: Name of the schedule and what it runs; they pass `check_measurable`.

    Returns:
        The time of an optimizer step of each, in seconds.

    Raises:
        ScheduleRunError: If a process fails; the others are ended.
    """
    seconds: dict[int, float] = {}
    for ranks in sorted({workload.times.num_stages for _, workload in cases}):
        chosen = [index for index, (_, workload) in enumerate(cases) if workload.times.num_stages == ranks]
        seconds |= zip(chosen, _launch(ranks, [cases[index] for index in chosen]), strict=True)
    return [seconds[index] for index in range(len(cases))]


def check_measurable(schedule: str, workload: Workload) -> None:
    """Checks that a schedule can be run on this machine.

    Raises:
        ValueError: If its stages share cores, if there is one alone, or if torch does not run it.
    """
    stages = workload.times.num_stages
    if workload.cores is not None:
        raise ValueError(f"cores={workload.cores}: sleeping stages take no core; leave it out to validate.")
    if not 2 <= stages <= MAX_PROCESSES:
        raise ValueError(f"stages={stages}: each is a process here; validate with 2 to {MAX_PROCESSES}.")
    if schedule == "1f1b" and workload.microbatches < stages:
        raise ValueError(
            f"microbatches={workload.microbatches}: torch's Schedule1F1B needs at least as many as stages={stages}."
        )
    if schedule in SEVERAL_STAGES and workload.microbatches % rounds_of(stages, workload.microbatches):
        raise ValueError(
            f"microbatches={workload.microbatches}: torch's {schedule} schedule needs a multiple of stages={stages}."
        )


def _launch(ranks: int, cases: list[tuple[str, Workload]]) -> list[float]:
    """Runs the cases one after the other in one set of processes."""
    store = host_store()
    with tempfile.TemporaryDirectory(prefix="lopt_schedules_") as folder:
        output = Path(folder) / "seconds.json"
        try:
            mp.spawn(_work, args=(ranks, store.port, output, cases), nprocs=ranks)
        except ProcessException as error:
            raise ScheduleRunError(f"a stage's process failed: {str(error).strip().splitlines()[-1]}") from error
        return json.loads(output.read_text())


def _work(rank: int, ranks: int, port: int, output: Path, cases: list[tuple[str, Workload]]) -> None:
    """One process: runs every case; the first writes their step times."""
    end_with_spawner()
    torch.set_num_threads(1)
    store = dist.TCPStore(LOOPBACK, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    links = [new_group([sender, sender + 1]) for sender in range(ranks - 1)]
    monitor = PeerMonitor(store, rank, {}, PEER_TIMEOUT_SECONDS)
    seconds = [_measure(schedule, workload, links, monitor) for schedule, workload in cases]
    if rank == 0:
        output.write_text(json.dumps(seconds))
    monitor.finish()
    dist.barrier()
    dist.destroy_process_group()


def _measure(schedule: str, workload: Workload, links: Sequence[dist.ProcessGroup], monitor: PeerMonitor) -> float:
    """Step time of one case: from the end of the first step to the end of the last, over all ranks."""
    if schedule != "ppll":
        return _time_steps(_end_to_end_step(schedule, workload), workload)
    stage = _LocalStage(workload, links, monitor)
    seconds = _time_steps(stage.step, workload)
    stage.close()
    return seconds


def _time_steps(run_step: Callable[[], object], workload: Workload) -> float:
    dist.barrier()
    ends = []
    for _ in range(1 + MEASURED_STEPS):
        run_step()
        time.sleep(workload.times.optimizer[dist.get_rank()])
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


def _end_to_end_step(schedule: str, workload: Workload) -> Callable[[], Any]:
    """A step of one of torch's schedules, without the optimizer's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
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

    def __init__(self, workload: Workload, links: Sequence[dist.ProcessGroup], monitor: PeerMonitor) -> None:
        self.workload, self.rank = workload, dist.get_rank()
        self.hidden_BTD = torch.zeros(1, 1, _values(workload))
        self.finished_steps = 0
        self.receiver: ReceivingChannel | None = None
        self.sender: SendingChannel | None = None
        options: Any = {"depth": workload.channel_depth, "device": torch.device("cpu"), "monitor": monitor}
        if self.rank > 0:
            self.receiver = ReceivingChannel(self.rank - 1, links[self.rank - 1], **options)
        if self.rank < len(links):
            self.sender = SendingChannel(self.rank + 1, links[self.rank], **options)

    def step(self) -> None:
        times = self.workload.times
        for micro_batch in range(self.workload.microbatches):
            batch = BatchId(self.finished_steps, micro_batch, checksum=0)
            hidden_BTD = self.receiver.get(batch) if self.receiver is not None else self.hidden_BTD
            time.sleep(times.forward[self.rank])
            if self.sender is not None:
                self.sender.put(batch, hidden_BTD)
            time.sleep(times.local[self.rank])
            time.sleep(times.backward[self.rank])
        self.finished_steps += 1

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
