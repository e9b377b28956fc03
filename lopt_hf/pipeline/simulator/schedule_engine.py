"""Start and end of every action of a pipeline's ranks: two engines for the same program.

`run_unshared` solves for all ranks together with NumPy and reaches thousands of ranks. `run_shared` is an event queue
for ranks that share cores, where the pace of one depends on how many others compute at the moment.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["NO_MESSAGE", "Program", "ScheduleDeadlockError", "Timing", "run_shared", "run_unshared"]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

NO_MESSAGE = -1  # the last entry of the engines' arrays of messages, complete at time zero


class ScheduleDeadlockError(RuntimeError):
    """Ranks wait for each other in a circle: with blocking sends and receives this order never ends."""


@dataclass(frozen=True)
class Program:
    """The actions of each rank in order, and the messages between ranks.

    A rank does its actions one after the other. An action starts when the one before has ended and the messages it
    waits for are complete. A message is a rendezvous, as with NCCL and gloo: its transfer begins when it has been
    sent, its receive has been posted and the link has done the messages before it; it completes for both sides when
    it is through.

    "Stamps" number the moments of a run: 0 is its start, `2 a + 1` and `2 a + 2` are the start and the end of action
    `a`. Actions are numbered rank by rank.

    Attributes:
        rank_actions: Bounds of each rank's actions, (ranks + 1).
        seconds: Time of each action, (actions).
        arrival: Message that the action takes in, or `NO_MESSAGE`, (actions).
        sent: Message of the rank's own that must be complete before the action starts, or `NO_MESSAGE`, (actions).
        link_messages: Bounds of each link's messages in `queue`, (links + 1).
        queue: The messages of each link in the order in which they are sent.
        link_sender, link_receiver: Ranks at the ends of each link, (links).
        send_stamp, receive_stamp: Moments at which each message is sent and its receive is posted, (messages).
        transfer_seconds: Time for which a message occupies its link.
        latency_seconds: Time that a message takes beyond that, without occupying the link.
    """

    rank_actions: Integers
    seconds: Floats
    arrival: Integers
    sent: Integers
    link_messages: Integers
    queue: Integers
    link_sender: Integers
    link_receiver: Integers
    send_stamp: Integers
    receive_stamp: Integers
    transfer_seconds: float
    latency_seconds: float


@dataclass(frozen=True)
class Timing:
    """Start and end of every action in seconds, (actions) each."""

    start: Floats
    end: Floats


def run_unshared(program: Program) -> Timing:
    """Times a program whose ranks have a device each.

    Every round advances all ranks and links whose next action or message depends on known moments only; `nan` stands
    for a moment not known yet.

    Raises:
        ScheduleDeadlockError: If the ranks wait for each other.
    """
    return _Rounds(program).run()


class _Rounds:
    def __init__(self, program: Program) -> None:
        self.program = program
        ranks, links = len(program.rank_actions) - 1, len(program.link_messages) - 1
        self.stamps = np.full(1 + 2 * len(program.seconds), np.nan)
        self.stamps[0] = 0.0
        self.complete = np.full(len(program.send_stamp) + 1, np.nan)
        self.complete[NO_MESSAGE] = 0.0
        self.next_action = program.rank_actions[:-1].copy()
        self.rank_free = np.zeros(ranks)
        self.next_message = program.link_messages[:-1].copy()
        self.link_free = np.zeros(links)

    def run(self) -> Timing:
        ranks, links = np.arange(len(self.rank_free)), np.arange(len(self.link_free))
        while True:
            moved_ranks = self._advance_ranks(ranks)
            touched = np.zeros(len(self.rank_free), dtype=bool)
            touched[moved_ranks] = True
            moved_links = self._advance_links(self._links_of(touched, links))
            if not len(moved_ranks) and not len(moved_links):
                break
            touched[self.program.link_sender[moved_links]] = True
            touched[self.program.link_receiver[moved_links]] = True
            ranks, links = np.flatnonzero(touched), moved_links
        _check_finished(self.next_action, self.program)
        return Timing(self.stamps[1::2], self.stamps[2::2])

    def _links_of(self, touched: NDArray[np.bool_], moved_before: Integers) -> Integers:
        """The links that may have news: those of ranks that moved, and those that moved in the round before."""
        candidates = touched[self.program.link_sender] | touched[self.program.link_receiver]
        candidates[moved_before] = True
        return np.flatnonzero(candidates)

    def _advance_ranks(self, ranks: Integers) -> Integers:
        program = self.program
        ranks = ranks[self.next_action[ranks] < program.rank_actions[ranks + 1]]
        actions = self.next_action[ranks]
        ready = np.maximum(self.complete[program.arrival[actions]], self.complete[program.sent[actions]])
        known = ~np.isnan(ready)
        ranks, actions, ready = ranks[known], actions[known], ready[known]
        start = np.maximum(ready, self.rank_free[ranks])
        end = start + program.seconds[actions]
        self.stamps[2 * actions + 1] = start
        self.stamps[2 * actions + 2] = end
        self.rank_free[ranks] = end
        self.next_action[ranks] += 1
        return ranks

    def _advance_links(self, links: Integers) -> Integers:
        program = self.program
        links = links[self.next_message[links] < program.link_messages[links + 1]]
        messages = program.queue[self.next_message[links]]
        ready = np.maximum(self.stamps[program.send_stamp[messages]], self.stamps[program.receive_stamp[messages]])
        known = ~np.isnan(ready)
        links, messages, ready = links[known], messages[known], ready[known]
        free = np.maximum(ready, self.link_free[links]) + program.transfer_seconds
        self.link_free[links] = free
        self.complete[messages] = free + program.latency_seconds
        self.next_message[links] += 1
        return links


def run_shared(program: Program, cores: float) -> Timing:
    """Times a program whose ranks share the cores of one machine.

    While more ranks compute than there are cores, all of them slow down evenly (processor sharing, which is what an
    operating system's fair scheduler comes to). Messages take no core.

    Args:
        program: What the ranks do.
        cores: How many ranks compute at full speed.

    Raises:
        ScheduleDeadlockError: If the ranks wait for each other.
    """
    return _Events(program, cores).run()


class _Events:
    """An event queue. Work is measured on a clock of its own, which runs at the pace of every computing rank."""

    def __init__(self, program: Program, cores: float) -> None:
        self.program = program
        self.cores = cores
        self.now = 0.0
        self.work_clock = 0.0
        self.computing: list[tuple[float, int]] = []  # (work clock at the end, rank)
        self.transfers: list[tuple[float, int, bool]] = []  # (time, message, whether it is through or the link free)
        self.stamps = [0.0] + [math.nan] * (2 * len(program.seconds))
        self.complete = [False] * len(program.send_stamp) + [True]
        self.next_action = program.rank_actions[:-1].tolist()
        self.rank_is_busy = [False] * len(self.next_action)
        self.next_message = program.link_messages[:-1].tolist()
        self.link_is_busy = [False] * len(self.next_message)
        # Lists, because reading single values of an array takes several times as long.
        self.seconds, self.arrival, self.sent = (
            program.seconds.tolist(),
            program.arrival.tolist(),
            program.sent.tolist(),
        )
        self.last_action, self.last_message = program.rank_actions[1:].tolist(), program.link_messages[1:].tolist()
        self.queue, self.link_of = program.queue.tolist(), _link_of_each_message(program)
        self.send_stamp, self.receive_stamp = program.send_stamp.tolist(), program.receive_stamp.tolist()
        self.link_ends = list(zip(program.link_sender.tolist(), program.link_receiver.tolist(), strict=True))
        self.links_of_rank: list[list[int]] = [[] for _ in self.next_action]
        for link, ends in enumerate(self.link_ends):
            for rank in set(ends):
                self.links_of_rank[rank].append(link)

    def run(self) -> Timing:
        for rank in range(len(self.next_action)):
            self._try_rank(rank)
        while self.computing or self.transfers:
            pace = min(1.0, self.cores / len(self.computing)) if self.computing else 1.0
            end = self.now + (self.computing[0][0] - self.work_clock) / pace if self.computing else math.inf
            if self.transfers and self.transfers[0][0] <= end:
                self._pass(self.transfers[0][0], pace)
                self._finish_transfer()
            else:
                self._pass(end, pace)
                self._finish_action()
        _check_finished(np.array(self.next_action), self.program)
        stamps = np.array(self.stamps)
        return Timing(stamps[1::2], stamps[2::2])

    def _pass(self, time: float, pace: float) -> None:
        self.work_clock += (time - self.now) * pace
        self.now = time

    def _finish_action(self) -> None:
        self.work_clock, rank = heapq.heappop(self.computing)
        self.rank_is_busy[rank] = False
        self.stamps[2 * self.next_action[rank] + 2] = self.now
        self.next_action[rank] += 1
        self._try_links(rank)
        self._try_rank(rank)

    def _finish_transfer(self) -> None:
        _, message, is_through = heapq.heappop(self.transfers)
        link = self.link_of[message]
        if is_through:
            self.complete[message] = True
            for rank in self.link_ends[link]:
                self._try_rank(rank)
        else:
            self.link_is_busy[link] = False
            self._try_link(link)

    def _try_rank(self, rank: int) -> None:
        """Starts the rank's next action if it may start."""
        action = self.next_action[rank]
        if self.rank_is_busy[rank] or action == self.last_action[rank]:
            return
        if not (self.complete[self.arrival[action]] and self.complete[self.sent[action]]):
            return
        self.rank_is_busy[rank] = True
        self.stamps[2 * action + 1] = self.now
        heapq.heappush(self.computing, (self.work_clock + self.seconds[action], rank))
        self._try_links(rank)

    def _try_links(self, rank: int) -> None:
        for link in self.links_of_rank[rank]:
            self._try_link(link)

    def _try_link(self, link: int) -> None:
        """Starts the link's next transfer if both sides are there."""
        position = self.next_message[link]
        if self.link_is_busy[link] or position == self.last_message[link]:
            return
        message = self.queue[position]
        if math.isnan(self.stamps[self.send_stamp[message]] + self.stamps[self.receive_stamp[message]]):
            return
        self.link_is_busy[link] = True
        self.next_message[link] += 1
        free = self.now + self.program.transfer_seconds
        heapq.heappush(self.transfers, (free, message, False))
        heapq.heappush(self.transfers, (free + self.program.latency_seconds, message, True))


def _link_of_each_message(program: Program) -> list[int]:
    links = np.zeros(len(program.send_stamp), dtype=np.int64)
    counts = np.diff(program.link_messages)
    links[program.queue] = np.repeat(np.arange(len(counts)), counts)
    return links.tolist()


def _check_finished(next_action: Integers, program: Program) -> None:
    waiting = np.flatnonzero(next_action < program.rank_actions[1:])
    if len(waiting):
        rank = int(waiting[0])
        done = int(next_action[rank] - program.rank_actions[rank])
        raise ScheduleDeadlockError(
            f"the schedule never ends: {len(waiting)} ranks wait for each other; rank {rank} waits after {done} of "
            f"its {int(program.rank_actions[rank + 1] - program.rank_actions[rank])} actions."
        )
