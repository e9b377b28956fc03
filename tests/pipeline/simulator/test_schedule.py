"""Simulated schedules against closed forms, against torch's own orders, and against each other."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from lopt_hf.pipeline.simulator.schedule import SCHEDULES, StageTimes, UnfitWorkloadError, Workload, simulate
from lopt_hf.pipeline.simulator.schedule_engine import Program, ScheduleDeadlockError, run_shared, run_unshared
from lopt_hf.pipeline.simulator.schedule_kinds import Kind
from lopt_hf.pipeline.simulator.schedule_orders import rounds_of

FORWARD, BACKWARD = 0.1, 0.2
LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
END_TO_END = [name for name, schedule in SCHEDULES.items() if schedule.flushes]
OWN_LETTERS = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.INPUT: "I", Kind.WEIGHT: "W"}
SIZES = [(2, 4), (3, 6), (4, 4), (4, 16), (8, 64)]  # stages, micro-batches


def equal_workload(stages: int, microbatches: int, **settings: float) -> Workload:
    return Workload(StageTimes.equal(stages, FORWARD, BACKWARD), microbatches, **settings)


def uneven_workload(stages: int, microbatches: int, seed: int = 0, **settings: float) -> Workload:
    draw = np.random.default_rng(seed).uniform(0.05, 0.3, (4, stages)).tolist()
    return Workload(StageTimes(*map(tuple, draw)), microbatches, **settings)


# ---- Closed forms ----


@pytest.mark.parametrize("stages, microbatches", SIZES)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b_idle_by_the_formula(schedule, stages, microbatches):
    result = simulate(schedule, equal_workload(stages, microbatches))
    assert result.bubble == pytest.approx([(stages - 1) / (microbatches + stages - 1)] * stages)
    assert result.step_seconds == pytest.approx((microbatches + stages - 1) * (FORWARD + BACKWARD))


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("stages, microbatches", SIZES)
def test_interleaved_idles_by_the_formula(stages, microbatches, chunks):
    result = simulate("interleaved", equal_workload(stages, microbatches, virtual_stages=chunks))
    assert result.bubble == pytest.approx([(stages - 1) / (chunks * microbatches + stages - 1)] * stages)


@pytest.mark.parametrize("stages, microbatches", SIZES)
def test_zero_bubble_idles_by_the_formula(stages, microbatches):
    """ZB-H1 with equal parts (arXiv 2401.10241, Tab. 1): a bubble of (K - 1) (F + B - W), a third of 1F1B's."""
    result = simulate("zero-bubble", equal_workload(stages, microbatches))
    idle = (stages - 1) * FORWARD
    assert result.bubble == pytest.approx([idle / (microbatches * 3 * FORWARD + idle)] * stages)


@pytest.mark.parametrize("stages, microbatches", [(1, 4), *SIZES[:3], (3, 5), (4, 16), (8, 64)])
def test_zbv_has_no_bubble_where_its_parts_take_the_same_time(stages, microbatches):
    """As its paper says (arXiv 2401.10241, Sec. 6), with the micro-batches that fill it, 2 K - 1."""
    result = simulate("zbv", equal_workload(stages, microbatches))
    if microbatches >= 2 * stages - 1:
        assert result.bubble == pytest.approx([0] * stages)
        assert result.closed_form_bubble == 0
    else:
        assert min(result.bubble) > 0
        assert result.closed_form_bubble is None
    assert simulate("zbv", equal_workload(4, 8, weight_share=0.3)).closed_form_bubble is None


@pytest.mark.parametrize("stages, microbatches", [(2, 4), (3, 6), (4, 16), (8, 64)])
def test_dualpipev_idles_by_the_formula(stages, microbatches):
    """(K - 1) (F&B + B - 3 W) with K ranks (arXiv 2412.19437, Tab. 2); a pair is as long as its two together."""
    result = simulate("dualpipev", equal_workload(stages, microbatches))
    idle = (stages - 1) * (FORWARD + BACKWARD + BACKWARD - 3 * FORWARD) / 2
    assert result.bubble == pytest.approx([idle / (microbatches * 3 * FORWARD + idle)] * stages)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("stages, microbatches", SIZES)
def test_interleaved_zero_bubble_idles_by_the_formula(stages, microbatches, chunks):
    """ZB-H1's bubble, each of whose parts is a smaller stage's."""
    result = simulate("interleaved_zb", equal_workload(stages, microbatches, virtual_stages=chunks))
    idle = (stages - 1) * FORWARD / chunks
    assert result.bubble == pytest.approx([idle / (microbatches * 3 * FORWARD + idle)] * stages)
    assert result.closed_form_bubble == pytest.approx(result.bubble[0])


def test_zero_bubble_with_nothing_put_off_is_1f1b():
    zero_bubble, one_f_one_b = (
        simulate(name, equal_workload(4, 8, weight_share=0.0)) for name in ("zero-bubble", "1f1b")
    )
    assert zero_bubble.step_seconds == pytest.approx(one_f_one_b.step_seconds)
    assert zero_bubble.closed_form_bubble == pytest.approx(one_f_one_b.closed_form_bubble)


@pytest.mark.parametrize("stages, microbatches", [*SIZES, (16, 1), (16, 3)])
def test_ppll_never_idles_after_the_fill(stages, microbatches):
    result = simulate("ppll", equal_workload(stages, microbatches))
    assert result.bubble == pytest.approx([0] * stages)
    assert result.speedup == pytest.approx(stages)
    assert result.fill_seconds == pytest.approx((stages - 1) * FORWARD)  # each stage sends right after its forward


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_printed_formula_is_what_comes_out(schedule):
    result = simulate(schedule, equal_workload(6, 18))
    if schedule == "ppll_delayed":
        assert result.closed_form_bubble is None
    else:
        assert result.bubble == pytest.approx([result.closed_form_bubble] * 6)


@pytest.mark.parametrize("stages, microbatches", [*SIZES, (16, 1)])
def test_delayed_gradients_wait_for_nothing(stages, microbatches):
    """Nor does the last stage, where graphs are kept; where forwards run again it is the only one without them."""
    kept = simulate("ppll_delayed", equal_workload(stages, microbatches, keeps_graph=True))
    assert kept.bubble == pytest.approx([0] * stages)
    assert kept.speedup == pytest.approx(stages)
    again = simulate("ppll_delayed", equal_workload(stages, microbatches))
    assert again.step_seconds == pytest.approx(microbatches * (2 * FORWARD + BACKWARD))
    assert again.bubble == pytest.approx([0] * (stages - 1) + [FORWARD / (2 * FORWARD + BACKWARD)])


def test_delayed_backwards_are_of_as_many_steps_before_as_there_are_stages_behind():
    workload = equal_workload(3, 2)
    events = [event for event in simulate("ppll_delayed", workload).events(4) if event.stage == 0]
    assert [(event.kind, event.microbatch) for event in events[-4:]] == [
        ("forward", 6), ("backward", 2), ("forward", 7), ("backward", 3),
    ]  # fmt: skip


def test_ppll_goes_at_the_pace_of_its_slowest_stage():
    times = StageTimes((0.1, 0.2, 0.1), (0.2, 0.5, 0.3), (0.05, 0.05, 0.0), (0.4, 0.3, 0.2))
    result = simulate("ppll", Workload(times, 5))
    assert result.step_seconds == pytest.approx(5 * (0.2 + 0.5 + 0.05) + 0.3)
    assert result.bubble[1] == pytest.approx(0)
    assert result.bubble[2] == pytest.approx(1 - (5 * 0.4 + 0.2) / result.step_seconds)


@pytest.mark.parametrize("schedule", END_TO_END)
def test_end_to_end_steps_wait_for_the_optimizer(schedule):
    times = StageTimes.equal(4, FORWARD, BACKWARD, optimizer=0.5)
    without = simulate(schedule, equal_workload(4, 8)).step_seconds
    assert simulate(schedule, Workload(times, 8)).step_seconds == pytest.approx(without + 0.5)


@pytest.mark.parametrize("schedule", END_TO_END)
def test_local_objectives_cost_nothing_end_to_end(schedule):
    times = StageTimes.equal(4, FORWARD, BACKWARD, local=0.3)
    assert simulate(schedule, Workload(times, 8)).step_seconds == simulate(schedule, equal_workload(4, 8)).step_seconds


# ---- Orders ----


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("stages, microbatches", [*SIZES, (4, 3), (4, 10)])
def test_orders_are_those_of_torch(stages, microbatches, chunks):
    per_round = microbatches // rounds_of(stages, microbatches)
    torch_self = SimpleNamespace(
        _num_stages=stages,
        num_stages=2 * stages,  # of the schedules in the form of a V
        pp_group_size=stages,
        n_local_stages=chunks,
        _n_microbatches=microbatches,
        microbatches_per_round=per_round,
    )
    for rank in range(stages):
        theirs = ScheduleInterleaved1F1B._calculate_single_rank_operations(torch_self, rank)
        assert own_order("interleaved", rank, stages, chunks, microbatches) == torch_order(theirs)
        theirs = ScheduleInterleavedZeroBubble._calculate_single_rank_operations(torch_self, rank)
        assert own_order("interleaved_zb", rank, stages, chunks, microbatches) == torch_order(theirs)
        if chunks == 1:
            assert own_order("zero-bubble", rank, stages, 1, microbatches) == torch_order(theirs)
            theirs = ScheduleGPipe._get_pipeline_order(torch_self)[rank]
            assert own_order("gpipe", rank, stages, 1, microbatches) == torch_order(theirs)
            # Of the last rank, torch 2.13 numbers the forwards from 1 here; what it runs is right.
            if microbatches >= stages and rank < stages - 1:
                theirs = Schedule1F1B._get_pipeline_order(torch_self)[rank]
                assert own_order("1f1b", rank, stages, 1, microbatches) == torch_order(theirs)


@pytest.mark.parametrize("stages, microbatches", [*SIZES, (1, 3), (3, 7), (4, 9), (5, 20), (4, 3)])
def test_orders_in_the_form_of_a_v_are_those_of_torch(stages, microbatches):
    torch_self = SimpleNamespace(num_stages=2 * stages, pp_group_size=stages, _n_microbatches=microbatches)
    for rank in range(stages):
        theirs = ScheduleZBVZeroBubble._calculate_single_rank_operations(torch_self, rank)
        assert own_order("zbv", rank, stages, 2, microbatches) == torch_order(theirs)
        if microbatches >= 2 * stages:
            theirs = ScheduleDualPipeV._calculate_single_rank_operations(torch_self, rank)
            assert own_order("dualpipev", rank, stages, 2, microbatches) == torch_order(theirs)


def own_order(name: str, rank: int, stages: int, chunks: int, microbatches: int) -> list[tuple[str, int, int]]:
    rows = SCHEDULES[name].order(rank, stages, chunks, microbatches)
    return [
        (OWN_LETTERS[kind], stage_of(name, rank, chunk, stages), microbatch)
        for kind, chunk, microbatch in rows.T.tolist()
        if kind != Kind.NOTHING
    ]


def stage_of(schedule: str, rank: int, chunk: int, ranks: int) -> int:
    return 2 * ranks - 1 - rank if SCHEDULES[schedule].is_v and chunk == 1 else chunk * ranks + rank


def torch_order(actions: list) -> list[tuple[str, int, int]]:
    flat = [part for action in actions if action is not None for part in action.sub_actions or [action]]
    steps = [(a.computation_type.name, a.stage_index, a.microbatch_index) for a in flat]
    return [(LETTERS[name], stage, microbatch) for name, stage, microbatch in steps if name in LETTERS]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cores", [None, 3])
def test_events_respect_what_depends_on_what(schedule, cores):
    workload = uneven_workload(4, 8, message_bytes=1e6, bandwidth=1e8, latency=1e-3, cores=cores)
    events = list(simulate(schedule, workload).events(2))
    ranks, chosen = 4, SCHEDULES[schedule]
    stages = 8 if chosen.is_v or chosen.has_virtual_stages else 4
    found = {(e.kind, stage_of(schedule, e.stage, e.chunk, ranks), e.microbatch): e for e in events}
    assert len(found) == len(events)
    for (kind, stage, microbatch), event in found.items():
        message = 0.01 + 0.001
        if kind == "forward" and stage > 0:
            before = found["forward", stage - 1, microbatch]
            assert event.start >= before.end + message * (before.stage != event.stage) - 1e-9
        if microbatch < 0:  # of delayed gradients: as in the middle of a run
            continue
        if kind == "backward":
            assert event.start >= found["forward", stage, microbatch].end - 1e-9
            if stage < stages - 1 and schedule != "ppll":
                behind = found["backward", stage + 1, microbatch]
                assert event.start >= behind.end + message * (behind.stage != event.stage) - 1e-9
        if kind == "weight":
            assert event.start >= found["backward", stage, microbatch].end - 1e-9
    for stage in range(4):
        own = sorted((e for e in events if e.stage == stage), key=lambda e: e.start)
        assert all(after.start >= before.end - 1e-9 for before, after in zip(own, own[1:], strict=False))


# ---- Messages ----


@pytest.mark.parametrize("schedule, stages_on_path", [("gpipe", 2), ("1f1b", 2), ("interleaved", 4)])
def test_a_single_micro_batch_pays_for_every_message(schedule, stages_on_path):
    workload = equal_workload(2, 1, message_bytes=1e6, bandwidth=1e7, latency=0.01)
    seconds = 2 * (FORWARD + BACKWARD) + 2 * (stages_on_path - 1) * (0.1 + 0.01)
    assert simulate(schedule, workload).step_seconds == pytest.approx(seconds)


def test_gpipe_receives_when_it_needs_and_pays_for_each_message():
    """torch's `ScheduleGPipe` posts a receive when it waits for it, so that no transfer overlaps with computing."""
    count, message = 5, 0.03
    workload = equal_workload(2, count, message_bytes=1e6, bandwidth=1e6 / message)
    seconds = FORWARD + count * (message + FORWARD) + BACKWARD + count * (message + BACKWARD)
    assert simulate("gpipe", workload).step_seconds == pytest.approx(seconds)


def test_1f1b_sends_only_when_the_message_before_is_through():
    """torch's `Schedule1F1B` waits for its second forward message before its fourth forward."""
    times = StageTimes((1.0, 10.0, 1.0, 1.0), (1.0,) * 4, (0.0,) * 4, (0.0,) * 4)
    events = simulate("1f1b", Workload(times, 4)).events(1)
    starts = [event.start for event in events if event.stage == 0 and event.kind == "forward"]
    assert starts == pytest.approx([0, 1, 2, 1 + 10])  # stage 1 asks for the second when it is done with the first


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_optimizer_waits_until_the_last_gradient_is_sent(schedule):
    times = StageTimes((0.1, 0.1), (0.2, 0.2), (0.0, 0.0), (0.1, 0.1))
    events = list(simulate(schedule, Workload(times, 4, message_bytes=1e6, bandwidth=1e7)).events(1))
    arrival = max(event.start for event in events if event.stage == 0 and event.kind == "backward")
    optimizer = next(event for event in events if event.stage == 1 and event.kind == "optimizer")
    assert optimizer.start == pytest.approx(arrival)


def test_messages_of_ppll_overlap_with_computing_until_they_take_longer():
    fast = equal_workload(4, 8, message_bytes=1e6, bandwidth=1e6 / 0.25, latency=0.04)  # 0.29 s a message
    assert simulate("ppll", fast).bubble == pytest.approx([0] * 4)
    slow = replace(fast, bandwidth=1e6 / 0.55, latency=0.05)  # 0.6 s a message, 0.3 s of computing
    assert simulate("ppll", slow).step_seconds == pytest.approx(8 * 0.6)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_slow_stage_holds_the_ones_before_it_back(depth):
    times = StageTimes((0.01, 1.0), (0.01, 1.0), (0.0, 0.0), (0.0, 0.0))
    events = list(simulate("ppll", Workload(times, 20, channel_depth=depth)).events(3))
    forwards = [[e for e in events if e.stage == stage and e.kind == "forward"] for stage in range(2)]
    ahead = [sum(first.end <= taken.start for first in forwards[0]) - index for index, taken in enumerate(forwards[1])]
    # At each end of the channel its depth and one under way, and one that is made but not yet handed over.
    assert max(ahead) == 2 * (depth + 1) + 1


def test_a_link_carries_one_message_at_a_time():
    """Stage 0 makes its outputs faster than the link carries them."""
    times = StageTimes((0.01, 0.01), (0.01, 0.01), (0.0, 0.0), (0.0, 0.0))
    for schedule in ("ppll", "gpipe", "interleaved"):
        workload = Workload(times, 16, message_bytes=1e6, bandwidth=1e7)
        assert simulate(schedule, workload).step_seconds >= 16 * 0.1


# ---- Engines ----


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(5))
def test_both_engines_agree_where_every_stage_has_a_core(schedule, seed):
    """They share no code: one solves for moments, the other plays events."""
    workload = uneven_workload(5, 10, seed, message_bytes=1e6, bandwidth=2e7, latency=0.02)
    one, other = simulate(schedule, workload), simulate(schedule, replace(workload, cores=5))
    assert other.step_seconds == pytest.approx(one.step_seconds)
    assert other.bubble == pytest.approx(one.bubble)
    assert other.fill_seconds == pytest.approx(one.fill_seconds)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_core_does_all_the_work_one_after_the_other(schedule):
    workload = uneven_workload(4, 8, cores=1)
    times = workload.times
    again = sum(times.forward[:-1]) * (schedule == "ppll_delayed")
    work = 8 * (sum(times.forward) + again + sum(times.backward) + sum(times.local) * (schedule == "ppll"))
    assert simulate(schedule, workload).step_seconds == pytest.approx(work + sum(times.optimizer), rel=0.02)


def test_two_cores_halve_the_pace_of_four_busy_stages():
    assert simulate("ppll", equal_workload(4, 8, cores=2)).speedup == pytest.approx(2)
    # 1F1B has bubbles that others can use: more than half of its speed is left
    whole, half = (simulate("1f1b", equal_workload(4, 8, cores=cores)).speedup for cores in (None, 2))
    assert whole / 2 < half < 2


def test_large_pipelines_follow_the_formula():
    result = simulate("1f1b", equal_workload(512, 512))
    assert result.bubble == pytest.approx([511 / 1023] * 512)


@pytest.mark.parametrize("run", [run_unshared, lambda program: run_shared(program, 2)])
def test_ranks_that_wait_for_each_other_are_an_error(run):
    """Both ranks want to receive before they send."""
    program = Program(
        rank_actions=np.array([0, 1, 2]),
        seconds=np.ones(2),
        arrival=np.array([1, 0]),
        sent=np.array([-1, -1]),
        link_messages=np.array([0, 1, 2]),
        queue=np.array([0, 1]),
        link_sender=np.array([0, 1]),
        link_receiver=np.array([1, 0]),
        send_stamp=np.array([2, 4]),
        receive_stamp=np.array([0, 0]),
        transfer_seconds=0.0,
        latency_seconds=0.0,
    )
    with pytest.raises(ScheduleDeadlockError, match="2 ranks wait for each other; rank 0 waits after 0 of"):
        run(program)


# ---- Activations, input ----


def test_activations_in_flight():
    peaks = {name: simulate(name, equal_workload(4, 8)).peak_in_flight for name in SCHEDULES}
    assert peaks["ppll"] == (1, 1, 1, 1)
    assert peaks["gpipe"] == (8, 8, 8, 8)
    assert peaks["1f1b"] == (4, 3, 2, 1)
    assert peaks["zero-bubble"] == (4, 4, 4, 4)  # until the weights' gradients are done
    # Of the next three each is half a rank: no more than 1F1B's first stage holds, on every rank.
    assert peaks["interleaved_zb"] == peaks["zbv"] == (4, 4, 4, 4)
    assert peaks["dualpipev"] == (9 / 2,) * 4
    assert peaks["ppll_delayed"] == (1, 1, 1, 1)
    kept = simulate("ppll_delayed", equal_workload(4, 8, keeps_graph=True))
    assert kept.peak_in_flight == (3 * 8 + 1, 2 * 8 + 1, 8 + 1, 1)
    # Megatron's warm-up, (V - 1) K + 2 (K - 1 - rank), and the forward that follows it; each is half a rank
    assert peaks["interleaved"] == (11 / 2, 9 / 2, 7 / 2, 5 / 2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"microbatches": 0}, "microbatches=0: must be at least 1"),
        ({"channel_depth": 0}, "channel_depth=0: must be at least 1"),
        ({"virtual_stages": 0}, "virtual_stages=0: must be at least 1"),
        ({"bandwidth": 0.0}, "bandwidth=0.0: must be more than 0"),
        ({"latency": -1.0}, "latency=-1.0: must be finite and not negative"),
        ({"cores": 0}, "cores=0: must be more than 0"),
        ({"weight_share": 2.0}, "weight_share=2.0: must be between 0 and 1"),
    ],
)
def test_bad_workloads(settings, message):
    with pytest.raises(ValueError, match=message):
        Workload(**{"times": StageTimes.equal(2, 1.0, 1.0), "microbatches": 4, **settings})


@pytest.mark.parametrize(
    "times, message",
    [
        (((1.0,), (1.0, 2.0), (0.0,), (0.0,)), r"backward=\[1.0, 2.0\] has 2 values but forward has 1"),
        (((1.0,), (-1.0,), (0.0,), (0.0,)), r"backward=\[-1.0\]: times are finite and not negative"),
        (((0.0,), (0.0,), (0.0,), (0.0,)), "every stage needs some time"),
    ],
)
def test_bad_times(times, message):
    with pytest.raises(ValueError, match=message):
        StageTimes(*times)


def test_bad_schedules():
    with pytest.raises(ValueError, match="schedule='zb': choose among ppll, gpipe"):
        simulate("zb", equal_workload(2, 4))
    with pytest.raises(UnfitWorkloadError, match="microbatches=10 with stages=3: interleaved deals .* 3 equal rounds"):
        simulate("interleaved", equal_workload(3, 10))
    with pytest.raises(UnfitWorkloadError, match="microbatches=5 with stages=3: dualpipev needs at least twice"):
        simulate("dualpipev", equal_workload(3, 5))
