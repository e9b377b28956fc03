"""Simulated steps against torch's own programs, sends and receives included, run here on a clock of numbers.

So no machine's load is in the comparison, as it is with sleeping stages.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from lopt_hf.pipeline.simulator.schedule import SCHEDULES, StageTimes, Workload, simulate

CLASSES: dict[str, Any] = {
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "interleaved_zb": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}
STEPS = 2  # the second is timed


def program(schedule: str, ranks: int, microbatches: int) -> tuple[dict[int, list[Any]], list[int]]:
    """What each rank does in a step by torch, and the rank of each stage."""
    num_stages = 2 * ranks
    stages = range(num_stages)
    owner = [min(s, num_stages - 1 - s) if SCHEDULES[schedule].is_v else s % ranks for s in stages]
    settings = SimpleNamespace(
        _num_stages=num_stages,
        num_stages=num_stages,
        pp_group_size=ranks,
        n_local_stages=2,
        _n_microbatches=microbatches,
        microbatches_per_round=microbatches // max(1, microbatches // ranks),
    )
    make = CLASSES[schedule]._calculate_single_rank_operations
    orders = {rank: [a for a in make(settings, rank) if a is not None] for rank in range(ranks)}
    sent = torch_schedules._add_send_recv(orders, stage_to_rank=owner.__getitem__, num_stages=num_stages)
    return sent, owner


class Clock:
    """Runs a program: a message is there when it has been sent and its receive has been posted."""

    def __init__(self, schedule: str, workload: Workload) -> None:
        self.times, self.ranks = workload.times, workload.times.num_stages
        self.program, self.owner = program(schedule, self.ranks, workload.microbatches)
        self.weight_share = workload.weight_share
        self.now = [0.0] * self.ranks
        self.moments: dict[tuple[Any, ...], float] = {}

    def run_step(self, step: int) -> float:
        """Returns when the last rank ends the step."""
        left = {rank: list(actions) for rank, actions in self.program.items()}
        while any(left.values()):
            moved = False
            for rank, actions in left.items():
                while actions and self.runs(step, rank, actions[0]):
                    actions.pop(0)
                    moved = True
            assert moved, "the program never ends"
        for rank, seconds in enumerate(self.times.optimizer):
            self.now[rank] += seconds
        return max(self.now)

    def runs(self, step: int, rank: int, action: Any) -> bool:
        """Runs an action, or returns that what it needs is not there."""
        now = self.now[rank]
        for part in action.sub_actions or (action,):
            kind, stage = part.computation_type.name, part.stage_index
            message = (step, "B" if "BACKWARD" in kind or kind.endswith("_B") else "F", part.microbatch_index)
            if kind.startswith(("SEND", "RECV")):
                to = stage if kind.startswith("RECV") else stage + (1 if kind == "SEND_F" else -1)
                self.moments[kind[:4], to, *message] = now
                continue
            before = stage - 1 if kind == "FORWARD" else stage + 1
            takes = kind != "BACKWARD_WEIGHT" and before in range(2 * self.ranks) and self.owner[before] != rank
            if takes:
                if ("SEND", stage, *message) not in self.moments:
                    return False
                now = max(now, self.moments["SEND", stage, *message], self.moments["RECV", stage, *message])
            now += self.seconds(kind, rank)
        self.now[rank] = now
        return True

    def seconds(self, kind: str, rank: int) -> float:
        share = {"FULL_BACKWARD": 1.0, "BACKWARD_INPUT": 1 - self.weight_share, "BACKWARD_WEIGHT": self.weight_share}
        return (self.times.forward[rank] if kind == "FORWARD" else self.times.backward[rank] * share[kind]) / 2


@pytest.mark.parametrize("stages, microbatches", [(2, 4), (3, 6), (3, 8), (4, 8), (5, 20)])
@pytest.mark.parametrize("schedule", CLASSES)
def test_steps_take_as_long_as_torchs_programs(schedule, stages, microbatches):
    for seed in range(4):
        forward, backward, optimizer = np.random.default_rng(seed).uniform(0.05, 0.3, (3, stages)).tolist()
        times = StageTimes(tuple(forward), tuple(backward), (0.0,) * stages, tuple(optimizer))
        workload = Workload(times, microbatches, weight_share=0.4)
        clock = Clock(schedule, workload)
        ends = [clock.run_step(step) for step in range(STEPS)]
        assert simulate(schedule, workload).step_seconds == pytest.approx(ends[1] - ends[0]), seed
