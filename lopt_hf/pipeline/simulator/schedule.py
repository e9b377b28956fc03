"""Simulation of pipeline schedules: local learning (PPLL) beside GPipe, 1F1B, zero bubble and others of torch.

The stage times are measured or given; what a schedule then costs is computed from the order of its actions, its
messages and its waiting, without a GPU and for thousands of stages:

    from lopt_hf.pipeline.simulator.schedule import StageTimes, Workload, simulate

    times = StageTimes.equal(16, forward=0.1, backward=0.2)
    print(simulate("1f1b", Workload(times, microbatches=32)).bubble)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lopt_hf.pipeline.events import Event
from lopt_hf.pipeline.simulator.closed_form import closed_form_bubble
from lopt_hf.pipeline.simulator.schedule_engine import Floats, Timing, run_shared, run_unshared
from lopt_hf.pipeline.simulator.schedule_kinds import Kind
from lopt_hf.pipeline.simulator.schedule_orders import (
    SCHEDULES,
    Orders,
    Schedule,
    UnfitWorkloadError,
    check_microbatches,
    link_program,
    make_orders,
)
from lopt_hf.pipeline.simulator.schedule_workload import StageTimes, Workload

__all__ = [
    "SCHEDULES",
    "ScheduleResult",
    "StageTimes",
    "UnfitWorkloadError",
    "Workload",
    "closed_form_bubble",
    "simulate",
    "simulate_all",
]

EVENTS = {kind: "backward" if kind is Kind.INPUT else kind.name.lower() for kind in Kind}
MOST_FORWARDS = 5_000_000  # simulated at a time, with what belongs to them: ours, minutes and 3 GB


@dataclass(frozen=True)
class ScheduleResult:
    """Result of simulating a schedule: one optimizer step once the pipeline is full.

    Attributes:
        schedule: Name of the schedule.
        workload: What was simulated.
        step_seconds: Time from the end of one optimizer step to the end of the next.
        fill_seconds: Time until the last stage begins its first micro-batch.
        bubble: Share of the time in which each stage computes nothing.
        closed_form_bubble: What `bubble` is with equal stages and no link cost; `None` where there is no formula.
        peak_in_flight: Most micro-batches whose activations each stage holds at once; a virtual stage counts as its
            part of the rank.
    """

    schedule: str
    workload: Workload
    step_seconds: float
    fill_seconds: float
    bubble: tuple[float, ...]
    closed_form_bubble: float | None
    peak_in_flight: tuple[float, ...]
    _orders: Orders = field(repr=False, compare=False)
    _timing: Timing = field(repr=False, compare=False)

    @property
    def microbatches_per_second(self) -> float:
        """Throughput of the whole pipeline."""
        return self.workload.microbatches / self.step_seconds

    @property
    def utilisation(self) -> float:
        """Share of the devices' time that is spent computing."""
        return 1 - sum(self.bubble) / len(self.bubble)

    @property
    def speedup(self) -> float:
        """Micro-batches per second relative to one device that trains all stages end-to-end."""
        times = self.workload.times
        each = sum(times.forward) + sum(times.backward)
        return (self.workload.microbatches * each + sum(times.optimizer)) / self.step_seconds

    def events(self, steps: int) -> Iterator[Event]:
        """Yields what the stages compute in the first steps, stage by stage.

        Args:
            steps: How many optimizer steps; schedules that flush have simulated two, the others three or more.
        """
        orders, timing = self._orders, self._timing
        ranks, actions = orders.kind_KA.shape
        last = actions * steps * self.workload.microbatches // orders.num_microbatches
        rank_KA = np.broadcast_to(np.arange(ranks)[:, None], (ranks, actions))
        columns = (rank_KA, orders.kind_KA, orders.chunk_KA, orders.microbatch_KA, timing.start, timing.end)
        rows = zip(*(column.reshape(ranks, actions)[:, :last].flat for column in columns), strict=True)
        for rank, kind, chunk, microbatch, start, end in rows:
            if end > start:
                yield Event(int(rank), EVENTS[kind], int(microbatch), float(start), float(end), int(chunk))


def simulate(schedule: str, workload: Workload) -> ScheduleResult:
    """Simulates a schedule.

    Args:
        schedule: A name of `SCHEDULES`.
        workload: The step and the hardware.

    Raises:
        ValueError: If there is no such schedule, or if it is too large to simulate.
        UnfitWorkloadError: If the micro-batches do not fit it.
    """
    _check_size([schedule], [workload])
    chosen, ranks = SCHEDULES[schedule], workload.times.num_stages
    check_microbatches(schedule, ranks, workload.microbatches, workload.virtual_stages)
    chunks = chosen.stages_per_rank(workload.virtual_stages)
    steps = _steps(chosen, workload)
    orders = make_orders(chosen, ranks, chunks, workload.microbatches, sum(steps))
    seconds_KA = _seconds(workload, chunks, orders, recomputes=chosen.is_delayed and not workload.keeps_graph)
    transfer, latency = workload.message_bytes / workload.bandwidth, workload.latency
    if not chosen.flushes:  # its channel has one message under way at a time
        transfer, latency = transfer + latency, 0.0
    program = link_program(chosen, orders, seconds_KA, transfer, latency, workload.channel_depth)
    timing = run_unshared(program) if workload.cores is None else run_shared(program, workload.cores)
    return _result(schedule, workload, steps, orders, timing)


def simulate_all(schedules: Sequence[str], workloads: Sequence[Workload]) -> tuple[list[ScheduleResult], list[str]]:
    """Simulates every schedule on every workload that fits it.

    Args:
        schedules: Names of `SCHEDULES`.
        workloads: What is trained, and on what.

    Returns:
        The results, and for each pair that is missing why.

    Raises:
        ValueError: If there is no such schedule, no result at all, or if they are too large to simulate.
    """
    _check_size(schedules, workloads)
    results: list[ScheduleResult] = []
    reasons: list[UnfitWorkloadError] = []
    for workload in workloads:
        for schedule in schedules:
            try:
                results.append(simulate(schedule, workload))
            except UnfitWorkloadError as error:
                reasons.append(error)
    if not results:
        raise reasons[0]
    return results, [str(reason) for reason in reasons]


def _check_size(schedules: Sequence[str], workloads: Sequence[Workload]) -> None:
    for schedule in schedules:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: choose among {', '.join(SCHEDULES)}.")
    number = sum(_num_forwards(schedule, workload) for schedule in schedules for workload in workloads)
    if number > MOST_FORWARDS:
        largest = max(workloads, key=lambda workload: workload.times.num_stages * workload.microbatches)
        raise ValueError(
            f"stages={largest.times.num_stages} with microbatches={largest.microbatches}, "
            f"channel_depth={largest.channel_depth} and virtual_stages={largest.virtual_stages}: {number:,} forwards "
            f"in all, and at most {MOST_FORWARDS:,} are simulated; lower one of these, or name fewer schedules."
        )


def _num_forwards(schedule: str, workload: Workload) -> int:
    chosen = SCHEDULES[schedule]
    stages = workload.times.num_stages * chosen.stages_per_rank(workload.virtual_stages)
    return stages * workload.microbatches * sum(_steps(chosen, workload))


class _Steps(NamedTuple):
    """Optimizer steps of a run: before those that are measured, measured, and after them."""

    before: int
    measured: int
    after: int


def _steps(schedule: Schedule, workload: Workload) -> _Steps:
    """Steps with a flush are all alike from the second on; without one, the pipeline has to fill first."""
    if schedule.flushes:
        return _Steps(1, 1, 0)
    depth, stages = workload.channel_depth, workload.times.num_stages
    microbatches = 4 * depth
    if workload.cores is not None:  # early and late stages must be measured while all others are at work, too
        microbatches = max(microbatches, 2 * (depth + 2) * stages)
    each = math.ceil(microbatches / workload.microbatches)
    return _Steps(each + (stages - 1) * schedule.is_delayed, each, each)  # the first stage's gradient comes last


def _seconds(workload: Workload, chunks: int, orders: Orders, recomputes: bool) -> Floats:
    times = workload.times
    forward_K, backward_K = np.array(times.forward) / chunks, np.array(times.backward) / chunks
    again_K = forward_K * recomputes
    again_K[-1] = 0  # the last stage's gradient is there at once
    table = {
        Kind.FORWARD: forward_K,
        Kind.BACKWARD: backward_K + again_K,
        Kind.INPUT: backward_K * (1 - workload.weight_share),
        Kind.WEIGHT: backward_K * workload.weight_share,
        Kind.LOCAL: np.array(times.local),
        Kind.OPTIMIZER: np.array(times.optimizer),
        Kind.NOTHING: np.zeros(len(forward_K)),
    }
    table_KN = np.stack([table[kind] for kind in Kind], axis=1)
    return np.take_along_axis(table_KN, orders.kind_KA, axis=1)


def _result(schedule: str, workload: Workload, steps: _Steps, orders: Orders, timing: Timing) -> ScheduleResult:
    ranks, actions = orders.kind_KA.shape
    start_KA, end_KA = timing.start.reshape(ranks, actions), timing.end.reshape(ranks, actions)
    step_actions = actions // sum(steps)
    first, last = steps.before * step_actions, (steps.before + steps.measured) * step_actions
    # A step ends when its last stage has ended it: stage 0 end-to-end, the last one with local learning.
    step_seconds = float(end_KA[:, last - 1].max() - end_KA[:, first - 1].max()) / steps.measured
    busy_K = (end_KA - start_KA)[:, first:last].sum(axis=1) / steps.measured
    is_first = (
        (orders.stage_KA == orders.num_stages - 1) & (orders.microbatch_KA == 0) & (orders.kind_KA == Kind.FORWARD)
    )
    return ScheduleResult(
        schedule=schedule,
        workload=workload,
        step_seconds=step_seconds,
        fill_seconds=float(start_KA[is_first][0]),
        bubble=tuple(np.maximum(0.0, 1 - busy_K / step_seconds).tolist()),
        closed_form_bubble=closed_form_bubble(schedule, workload),
        peak_in_flight=_peak_in_flight(schedule, workload, orders),
        _orders=orders,
        _timing=timing,
    )


def _peak_in_flight(schedule: str, workload: Workload, orders: Orders) -> tuple[float, ...]:
    """Activations live from the forward to the end of the last backward of their micro-batch."""
    ranks = len(orders.kind_KA)
    if SCHEDULES[schedule].is_delayed:  # what waits for its gradient is an input, or the graph of as many steps
        late = workload.microbatches * workload.keeps_graph
        return tuple(1.0 + (ranks - 1 - rank) * late for rank in range(ranks))
    frees = np.isin(orders.kind_KA, (Kind.BACKWARD, Kind.WEIGHT))
    change_KA = (orders.kind_KA == Kind.FORWARD).astype(np.int64) - frees
    return tuple((change_KA.cumsum(axis=1).max(axis=1) * ranks / orders.num_stages).tolist())
