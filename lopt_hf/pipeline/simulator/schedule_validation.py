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
from torch.distributed.pipelining import PipelineStage
from torch.multiprocessing.spawn import ProcessException

from lopt_hf.common.distributed import new_group
from lopt_hf.common.host_store import LOOPBACK, host_store
from lopt_hf.common.parent import end_with_spawner
from lopt_hf.pipeline.runtime.channel import BatchId, ReceivingChannel, SendingChannel
from lopt_hf.pipeline.runtime.health import PeerMonitor
from lopt_hf.pipeline.runtime.launch import choose_interface
from lopt_hf.pipeline.simulator.schedule import Workload
from lopt_hf.pipeline.simulator.schedule_orders import SCHEDULES, check_microbatches, stages_of
from lopt_hf.pipeline.simulator.torch_schedules import TORCH_SCHEDULES

__all__ = ["ScheduleRunError", "check_measurable", "measure_schedules"]

PEER_TIMEOUT_SECONDS = 60.0  # importing torch in several processes on a busy machine takes a while
MAX_PROCESSES = 16  # ours: each takes about 300 MB for torch alone
MEASURED_STEPS = 3
BYTES_PER_VALUE = 4
TAKES_ONE_STAGE = ("gpipe", "1f1b")  # the others take a list


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
    check_microbatches(schedule, stages, workload.microbatches, workload.virtual_stages, by_torch=True)


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
    choose_interface(LOOPBACK)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    links, back = ([new_group([sender, sender + 1]) for sender in range(ranks - 1)] for _ in range(2))
    monitor = PeerMonitor(store, rank, {}, PEER_TIMEOUT_SECONDS)
    seconds = [_measure(schedule, workload, links, back, monitor) for schedule, workload in cases]
    if rank == 0:
        output.write_text(json.dumps(seconds))
    monitor.finish()
    dist.barrier()
    dist.destroy_process_group()


def _measure(
    schedule: str,
    workload: Workload,
    links: Sequence[dist.ProcessGroup],
    back: Sequence[dist.ProcessGroup],
    monitor: PeerMonitor,
) -> float:
    """Step time of one case, over all ranks: from the end of the first step, or the filled pipeline's, to the last."""
    if SCHEDULES[schedule].flushes:
        return _time_steps(_end_to_end_step(schedule, workload), workload)
    stage: _LocalStage | _DelayedStage = (
        _DelayedStage(workload, links, back, monitor)
        if SCHEDULES[schedule].is_delayed
        else _LocalStage(workload, links, monitor)
    )
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
    rank = dist.get_rank()
    stages = _stages(schedule, workload, rank)
    runner = TORCH_SCHEDULES[schedule](
        stages[0] if schedule in TAKES_ONE_STAGE else stages,
        n_microbatches=workload.microbatches,
        loss_fn=lambda output, target: output.mean(),
    )
    inputs_MN = torch.zeros(workload.microbatches, _values(workload))
    arguments = (inputs_MN,) if rank == 0 else ()
    targets = {"target": torch.zeros(workload.microbatches)} if stages[-1].is_last else {}
    return lambda: runner.step(*arguments, **targets, return_outputs=False)


def _stages(schedule: str, workload: Workload, rank: int) -> list[PipelineStage]:
    times, ranks, chosen = workload.times, workload.times.num_stages, SCHEDULES[schedule]
    indices = stages_of(schedule, rank, ranks, workload.virtual_stages)
    chunks = len(indices)
    weight = times.backward[rank] * workload.weight_share / chunks if chosen.puts_weights_off else 0.0
    module = _SleepingStage(times.forward[rank] / chunks, times.backward[rank] / chunks - weight)
    # Called for every backward, at once where a schedule leaves it whole.
    puts_off = (lambda: lambda: time.sleep(weight)) if chosen.puts_weights_off else None
    return [
        PipelineStage(module, index, chunks * ranks, torch.device("cpu"), dw_builder=puts_off) for index in indices
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
            self.run_forward(micro_batch)
            time.sleep(times.local[self.rank])
            time.sleep(times.backward[self.rank])
        self.finished_steps += 1

    def run_forward(self, micro_batch: int) -> None:
        """Receives, computes and sends."""
        batch = BatchId(self.finished_steps, micro_batch, checksum=0)
        hidden_BTD = self.receiver.get(batch) if self.receiver is not None else self.hidden_BTD
        time.sleep(self.workload.times.forward[self.rank])
        if self.sender is not None:
            self.sender.put(batch, hidden_BTD)

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()


class _DelayedStage(_LocalStage):
    """A stage whose backward is that of a step before, one for each stage behind it; the last one's is at once."""

    def __init__(
        self,
        workload: Workload,
        links: Sequence[dist.ProcessGroup],
        back: Sequence[dist.ProcessGroup],
        monitor: PeerMonitor,
    ) -> None:
        super().__init__(workload, links, monitor)
        self.delay = len(links) - self.rank
        self.back_receiver: ReceivingChannel | None = None
        self.back_sender: SendingChannel | None = None
        options: Any = {"device": torch.device("cpu"), "monitor": monitor}
        if self.delay > 0:  # takes all of a step, see `StageLinks`
            depth = max(workload.channel_depth, workload.microbatches)
            self.back_receiver = ReceivingChannel(self.rank + 1, back[self.rank], depth=depth, **options)
        if self.rank > 0:
            depth = workload.channel_depth
            self.back_sender = SendingChannel(self.rank - 1, back[self.rank - 1], depth=depth, **options)

    def step(self) -> None:
        times, again = self.workload.times, self.delay > 0 and not self.workload.keeps_graph
        for micro_batch in range(self.workload.microbatches):
            self.run_forward(micro_batch)
            # Before there are gradients all take their time nevertheless, as in the middle of a run.
            late = BatchId(self.finished_steps - self.delay, micro_batch, checksum=0)
            if self.back_receiver is not None and late.step >= 0:
                self.back_receiver.get(late)
            time.sleep(times.forward[self.rank] * again + times.backward[self.rank])
            if self.back_sender is not None and late.step >= 0:
                self.back_sender.put(late, self.hidden_BTD)
        self.finished_steps += 1

    def close(self) -> None:
        super().close()
        steps = range(max(0, self.finished_steps - self.delay), self.finished_steps)
        for late in (BatchId(step, number, 0) for step in steps for number in range(self.workload.microbatches)):
            if self.back_receiver is not None:
                self.back_receiver.get(late)
            if self.back_sender is not None:
                self.back_sender.put(late, self.hidden_BTD)
        if self.back_sender is not None:
            self.back_sender.close()
        if self.back_receiver is not None:
            self.back_receiver.close()
