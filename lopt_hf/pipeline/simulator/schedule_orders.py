"""Orders of the actions of a pipeline's ranks, schedule by schedule, and the messages that they wait for.

Arrays have one row for each rank (K ranks) and one column for each action of the rank (A actions): `_KA`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from lopt_hf.pipeline.simulator.schedule_engine import NO_MESSAGE, Floats, Integers, Program
from lopt_hf.pipeline.simulator.schedule_kinds import Kind
from lopt_hf.pipeline.simulator.schedule_v_orders import dualpipev_order, zbv_order

__all__ = [
    "Kind",
    "Orders",
    "SCHEDULES",
    "Schedule",
    "UnfitWorkloadError",
    "check_microbatches",
    "link_program",
    "make_orders",
    "rounds_of",
    "stages_of",
]


class UnfitWorkloadError(ValueError):
    """The number of micro-batches does not fit the schedule."""


@dataclass(frozen=True)
class Orders:
    """The actions of all ranks.

    Attributes:
        kind_KA: `Kind` of each action.
        stage_KA: Stage it belongs to; with V virtual stages a rank r holds r, r + K, ..., r + (V - 1) K, or r and
            2 K - 1 - r in the form of a V.
        chunk_KA: Which of the rank's stages that is.
        microbatch_KA: Its micro-batch, counted from the start of the run, negative of steps before it; of an optimizer
            step, the step's number.
        num_stages: Stages of all ranks together.
        num_microbatches: Micro-batches of the run.
    """

    kind_KA: Integers
    stage_KA: Integers
    chunk_KA: Integers
    microbatch_KA: Integers
    num_stages: int
    num_microbatches: int


@dataclass(frozen=True)
class Schedule:
    """A schedule.

    Attributes:
        order: Makes (kind, local stage, micro-batch) of one rank for one optimizer step, without the step itself, from
            rank, ranks, virtual stages and micro-batches; (3, actions).
        receives: When a receive is posted: `on_use`, right before the rank waits for it; `ahead`, early enough never
            to hold a message up; `bounded`, by the depth of the channel.
        sends: When a rank waits for messages of its own: `one_ahead`, before the next may be sent; `at_step`, at the
            end of the step; `bounded`, by the depth of the channel.
        summary: What it is, in a line.
        is_local: Whether stages learn locally: no gradient messages and no flush.
        is_delayed: Whether a stage's backward is that of a step before, one for each stage behind it: no flush.
        has_virtual_stages: Whether a rank may hold more than one stage.
        is_v: Whether a rank holds two, in the form of a V.
        has_pairs: Whether a forward and the backward that follows it are one action, at whose end both have their
            messages sent.
    """

    order: Callable[[int, int, int, int], Integers]
    receives: Literal["on_use", "ahead", "bounded"]
    sends: Literal["one_ahead", "at_step", "bounded"]
    summary: str
    is_local: bool = False
    is_delayed: bool = False
    has_virtual_stages: bool = False
    is_v: bool = False
    has_pairs: bool = False

    @property
    def flushes(self) -> bool:
        """Whether the pipeline drains at the end of each step, and fills anew."""
        return not (self.is_local or self.is_delayed)

    @property
    def puts_weights_off(self) -> bool:
        """Whether backwards of the weights come some time after those of the inputs."""
        return bool((self.order(0, 2, 2, 4)[0] == Kind.WEIGHT).any())

    def stages_per_rank(self, virtual_stages: int = 2) -> int:
        """Returns how many stages a rank holds, `virtual_stages` where that is free."""
        return 2 if self.is_v else virtual_stages if self.has_virtual_stages else 1


def _local_order(rank: int, ranks: int, chunks: int, microbatches: int) -> Integers:
    return _rows(
        np.tile([Kind.FORWARD, Kind.LOCAL, Kind.BACKWARD], microbatches), np.repeat(np.arange(microbatches), 3)
    )


def _delayed_order(rank: int, ranks: int, chunks: int, microbatches: int) -> Integers:
    return _rows(np.tile([Kind.FORWARD, Kind.BACKWARD], microbatches), np.repeat(np.arange(microbatches), 2))


def _gpipe_order(rank: int, ranks: int, chunks: int, microbatches: int) -> Integers:
    both = np.arange(microbatches)
    return _rows(np.repeat([Kind.FORWARD, Kind.BACKWARD], microbatches), np.concatenate([both, both]))


def _interleaved_order(rank: int, ranks: int, chunks: int, microbatches: int, hops: int = 2) -> Integers:
    """Forwards to fill, then forward and backward in turns, then the backwards that are left.

    Megatron-LM's interleaved schedule (arXiv 2104.04473, Sec. 2.2) in the generalisation of torch's
    `ScheduleInterleaved1F1B`, where a round need not be as many micro-batches as there are ranks.

    Args:
        hops: How many forwards more a rank starts with than the rank after it.
    """
    total, per_round = chunks * microbatches, microbatches // rounds_of(ranks, microbatches)
    warmup = min((chunks - 1) * per_round + hops * (ranks - 1 - rank), total)
    count = np.arange(total)
    within = count % (per_round * chunks)
    chunk, microbatch = within // per_round, count // (per_round * chunks) * per_round + within % per_round
    rows = np.empty((3, 2 * total), dtype=np.int64)
    is_forward = np.zeros(2 * total, dtype=bool)
    is_forward[:warmup] = True
    is_forward[warmup : 2 * total - warmup : 2] = True
    rows[:, is_forward] = np.stack([np.full(total, Kind.FORWARD), chunk, microbatch])
    rows[:, ~is_forward] = np.stack([np.full(total, Kind.BACKWARD), chunks - 1 - chunk, microbatch])
    return rows


_one_forward_one_backward_order = partial(_interleaved_order, hops=1)


def _zero_bubble_order(rank: int, ranks: int, chunks: int, microbatches: int) -> Integers:
    """1F1B, interleaved or not, whose backwards for the weights come `rank` backwards later.

    With one stage on a rank ZB-H1 (arXiv 2401.10241, Sec. 2.1), with several torch's `ScheduleInterleavedZeroBubble`.
    """
    rows = _one_forward_one_backward_order(rank, ranks, chunks, microbatches)
    rows[0, rows[0] == Kind.BACKWARD] = Kind.INPUT
    inputs = np.flatnonzero(rows[0] == Kind.INPUT)
    weights = np.concatenate([inputs[rank:], np.full(min(rank, len(inputs)), rows.shape[1] - 1)]) + 1
    put_off = rows[:, inputs]
    put_off[0] = Kind.WEIGHT
    return np.insert(rows, weights, put_off, axis=1)


def rounds_of(ranks: int, microbatches: int) -> int:
    """Returns the number of rounds into which an interleaved schedule divides a step's micro-batches."""
    return max(1, microbatches // ranks)


def _rows(kind: Integers, microbatch: Integers) -> Integers:
    return np.stack([kind, np.zeros_like(kind), microbatch])


# Receives and sends of the end-to-end schedules: `schedules.py` of torch 2.14's `torch.distributed.pipelining`.
SCHEDULES = {
    "ppll": Schedule(
        _local_order, "bounded", "bounded", "local learning: only forward messages, no flush", is_local=True
    ),
    "gpipe": Schedule(_gpipe_order, "on_use", "at_step", "all forwards, then all backwards"),
    "1f1b": Schedule(_one_forward_one_backward_order, "on_use", "one_ahead", "forwards and backwards in turns"),
    "interleaved": Schedule(
        _interleaved_order, "ahead", "at_step", "1F1B, several smaller stages on a rank", has_virtual_stages=True
    ),
    "zero-bubble": Schedule(
        _zero_bubble_order, "ahead", "at_step", "1F1B, the backward of the weights put off (ZB-H1)"
    ),
    "interleaved_zb": Schedule(
        _zero_bubble_order,
        "ahead",
        "at_step",
        "the same, several smaller stages on a rank",
        has_virtual_stages=True,
    ),
    "zbv": Schedule(
        zbv_order, "ahead", "at_step", "two smaller stages on a rank, the first with the last, ... (ZB-V)", is_v=True
    ),
    "dualpipev": Schedule(
        dualpipev_order,
        "ahead",
        "at_step",
        "likewise, forwards and backwards in pairs (DualPipeV)",
        is_v=True,
        has_pairs=True,
    ),
    "ppll_delayed": Schedule(
        _delayed_order,
        "bounded",
        "bounded",
        "the task's gradient, a step late for each stage behind: no flush",
        is_delayed=True,
    ),
}


def stages_of(schedule: str, rank: int, ranks: int, virtual_stages: int = 2) -> list[int]:
    """Returns the stages that a rank runs, in their order.

    Args:
        schedule: A name of `SCHEDULES`.
        rank: The rank.
        ranks: Number of ranks.
        virtual_stages: Stages of a rank where the schedule leaves that free.
    """
    if SCHEDULES[schedule].is_v:
        return [rank, 2 * ranks - 1 - rank]
    return [chunk * ranks + rank for chunk in range(SCHEDULES[schedule].stages_per_rank(virtual_stages))]


def check_microbatches(
    schedule: str, ranks: int, microbatches: int, virtual_stages: int = 2, by_torch: bool = False
) -> None:
    """Checks that a schedule takes so many micro-batches.

    Args:
        schedule: A name of `SCHEDULES`.
        ranks: Devices (or processes) of the pipeline.
        microbatches: Micro-batches of an optimizer step.
        virtual_stages: Stages of a rank where the schedule leaves that free.
        by_torch: Whether torch is to run it, which asks for more than the schedule itself.

    Raises:
        UnfitWorkloadError: If it does not.
    """
    chosen, rounds = SCHEDULES[schedule], rounds_of(ranks, microbatches)
    has_rounds = chosen.order in (_interleaved_order, _zero_bubble_order)
    if schedule == "dualpipev" and microbatches < 2 * ranks:
        needs = f"needs at least twice as many as stages; use {2 * ranks} or more"
    elif schedule == "1f1b" and by_torch and microbatches < ranks:
        needs = f"needs at least as many as stages in torch; use {ranks} or more"
    elif has_rounds and (by_torch or chosen.stages_per_rank(virtual_stages) > 1) and microbatches % rounds:
        needs = f"deals them out in {rounds} equal rounds; use a multiple of {ranks}"
    else:
        return
    raise UnfitWorkloadError(
        f"microbatches={microbatches} with stages={ranks}: {schedule} {needs}, or leave {schedule} out."
    )


def make_orders(schedule: Schedule, ranks: int, chunks: int, microbatches: int, steps: int) -> Orders:
    """Makes the orders of all ranks for a run.

    Args:
        schedule: One of `SCHEDULES`.
        ranks: Devices (or processes) of the pipeline.
        chunks: Stages on each rank.
        microbatches: Micro-batches of an optimizer step.
        steps: Optimizer steps of the run.
    """
    step_KXA = np.stack([schedule.order(rank, ranks, chunks, microbatches) for rank in range(ranks)])
    kind_KA, chunk_KA, microbatch_KA = (
        np.concatenate([step_KXA[:, row], np.full((ranks, 1), last)], axis=1)
        for row, last in enumerate((Kind.OPTIMIZER, 0, 0))
    )
    actions = kind_KA.shape[1]
    shift_A = np.repeat(np.arange(steps), actions) * np.tile(
        np.where(kind_KA[0] == Kind.OPTIMIZER, 1, microbatches), steps
    )
    rank_K1 = np.arange(ranks)[:, None]
    there_and_back_KA = np.where(chunk_KA == 0, rank_K1, 2 * ranks - 1 - rank_K1)
    all_kinds_KA, all_microbatches_KA = np.tile(kind_KA, (1, steps)), np.tile(microbatch_KA, (1, steps)) + shift_A
    if schedule.is_delayed:  # as in the middle of a run: of steps before the first one there are gradients, too
        late_KA = (ranks - 1 - rank_K1) * microbatches
        all_microbatches_KA -= np.where(all_kinds_KA == Kind.BACKWARD, late_KA, 0)
    return Orders(
        kind_KA=all_kinds_KA,
        stage_KA=np.tile(there_and_back_KA if schedule.is_v else chunk_KA * ranks + rank_K1, (1, steps)),
        chunk_KA=np.tile(chunk_KA, (1, steps)),
        microbatch_KA=all_microbatches_KA,
        num_stages=ranks * chunks,
        num_microbatches=steps * microbatches,
    )


def link_program(
    schedule: Schedule,
    orders: Orders,
    seconds_KA: Floats,
    transfer_seconds: float,
    latency_seconds: float,
    channel_depth: int,
) -> Program:
    """Adds the messages to the orders: which action waits for which message, and when sends and receives are posted.

    Each rank has a link to the next rank for hidden states, and one to the rank before it for their gradients. In the
    form of a V the second stages of the ranks send hidden states to the rank before, and gradients to the next.

    Args:
        schedule: The schedule of `orders`.
        orders: What each rank does.
        seconds_KA: Time of each action.
        transfer_seconds: Time for which a message occupies its link.
        latency_seconds: Time that a message takes beyond that.
        channel_depth: Messages that wait at each end of a link, beside the one that is under way, where `schedule`
            bounds them.
    """
    ranks, actions = orders.kind_KA.shape
    arrival_KA, own_KA = _messages(schedule, orders)
    number_KA = np.arange(ranks * actions).reshape(ranks, actions)
    stamps = np.zeros((2, 2 * orders.num_stages * orders.num_microbatches), dtype=np.int64)
    is_first_of_pair = (orders.kind_KA == Kind.FORWARD) & (_shifted(orders.kind_KA, -1) == Kind.BACKWARD)
    end_KA = 2 * (number_KA + (is_first_of_pair & schedule.has_pairs)) + 2
    stamps[0, own_KA[own_KA >= 0]] = end_KA[own_KA >= 0]
    stamps[1, arrival_KA[arrival_KA >= 0]] = _receive_stamps(schedule, orders, number_KA, channel_depth)[
        arrival_KA >= 0
    ]
    is_onwards = (orders.kind_KA == Kind.FORWARD) ^ (orders.chunk_KA == 1 if schedule.is_v else False)
    queues = [np.where(is_in, own_KA, NO_MESSAGE) for is_in in (is_onwards, ~is_onwards)]
    queue_LA = np.concatenate(queues)  # links forward, then links backward
    sender_L = np.tile(np.arange(ranks), 2)
    return Program(
        rank_actions=np.arange(ranks + 1) * actions,
        seconds=seconds_KA.reshape(-1),
        arrival=arrival_KA.reshape(-1),
        sent=_awaited_sends(schedule, orders, own_KA, channel_depth).reshape(-1),
        link_messages=np.concatenate([[0], np.cumsum((queue_LA >= 0).sum(axis=1))]),
        queue=queue_LA[queue_LA >= 0],
        link_sender=sender_L,
        link_receiver=(sender_L + np.repeat([1, -1], ranks)) % ranks,
        send_stamp=stamps[0],
        receive_stamp=stamps[1],
        transfer_seconds=transfer_seconds,
        latency_seconds=latency_seconds,
    )


def _messages(schedule: Schedule, orders: Orders) -> tuple[Integers, Integers]:
    """The message that each action takes in, and the one that it sends."""
    stage_KA, last = orders.stage_KA, orders.num_stages - 1
    number_KA = stage_KA * orders.num_microbatches + orders.microbatch_KA
    backward_KA = number_KA + orders.num_stages * orders.num_microbatches
    is_forward = orders.kind_KA == Kind.FORWARD
    is_backward = np.isin(orders.kind_KA, (Kind.BACKWARD, Kind.INPUT)) & (orders.microbatch_KA >= 0)
    crosses = len(stage_KA) > 1  # stages on the same rank hand over without a message
    to_back = crosses and not schedule.is_local
    has_previous, has_next = stage_KA > 0, stage_KA < last
    if schedule.is_v:  # in its middle, the next stage is on the same rank
        middle = len(stage_KA)
        has_previous, has_next = has_previous & (stage_KA != middle), has_next & (stage_KA != middle - 1)
    arrival_KA, own_KA = np.full_like(stage_KA, NO_MESSAGE), np.full_like(stage_KA, NO_MESSAGE)
    step = orders.num_microbatches
    np.copyto(arrival_KA, number_KA - step, where=is_forward & has_previous & crosses)
    np.copyto(arrival_KA, backward_KA + step, where=is_backward & has_next & to_back)
    np.copyto(own_KA, number_KA, where=is_forward & has_next & crosses)
    np.copyto(own_KA, backward_KA, where=is_backward & has_previous & to_back)
    return arrival_KA, own_KA


def _receive_stamps(schedule: Schedule, orders: Orders, number_KA: Integers, channel_depth: int) -> Integers:
    """The moment at which the receive of each action's message is posted."""
    if schedule.receives == "ahead":
        return np.zeros_like(number_KA)
    if schedule.receives == "on_use":
        end_of_previous_KA = 2 * number_KA
        end_of_previous_KA[:, 0] = 0
        return end_of_previous_KA
    stamps_KA = np.zeros_like(number_KA)
    forwards = np.flatnonzero(orders.kind_KA[0] == Kind.FORWARD)  # in the same columns on all ranks
    ahead = channel_depth + 1
    stamps_KA[:, forwards[ahead:]] = 2 * number_KA[:, forwards[:-ahead]] + 1
    return stamps_KA


def _awaited_sends(schedule: Schedule, orders: Orders, own_KA: Integers, channel_depth: int) -> Integers:
    """The message of its own that a rank waits for before each action, as torch's runtimes do."""
    one_before, two_before = _shifted(own_KA, 1), _shifted(own_KA, 2)
    if schedule.sends == "one_ahead":
        turns = orders.kind_KA != _shifted(orders.kind_KA, 1)
        return np.where(turns, one_before, two_before)
    if schedule.sends == "at_step":
        return _last_sends_of_steps(orders, own_KA)
    unfinished = channel_depth + 1
    # The channel for gradients takes all of a step, see `StageLinks`: no rank waits to get rid of them.
    one_before = np.where(_shifted(orders.kind_KA, 1) == Kind.FORWARD, one_before, NO_MESSAGE)
    is_sent = (one_before >= 0) & (_shifted(orders.microbatch_KA, 1) >= unfinished)
    return np.where(is_sent, one_before - unfinished, NO_MESSAGE)


def _last_sends_of_steps(orders: Orders, own_KA: Integers) -> Integers:
    """The optimizer step waits until all has been sent, the last backward message at the end."""
    columns = np.where(own_KA >= 0, np.arange(own_KA.shape[1]), 0)
    latest = np.take_along_axis(own_KA, np.maximum.accumulate(columns, axis=1), axis=1)
    return np.where(orders.kind_KA == Kind.OPTIMIZER, latest, NO_MESSAGE)


def _shifted(values_KA: Integers, columns: int) -> Integers:
    """Of each action what the one so many before it has; behind it with a negative number."""
    shifted_KA = np.roll(values_KA, columns, axis=1)
    shifted_KA[:, slice(0, columns) if columns > 0 else slice(columns, None)] = NO_MESSAGE
    return shifted_KA
