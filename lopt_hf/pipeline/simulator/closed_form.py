"""The share of idle time that the papers' formulas give for a schedule."""

import math

from lopt_hf.pipeline.simulator.schedule_workload import Workload

__all__ = ["closed_form_bubble"]


def closed_form_bubble(schedule: str, workload: Workload) -> float | None:
    """The share of the time in which stages idle if all are equal and messages and optimizer steps cost nothing.

    Sources: GPipe (arXiv 1811.06965, Sec. 2.3); 1F1B and interleaved (arXiv 2104.04473, Sec. 2.2), given there
    relative to the computing time; zero bubble (arXiv 2401.10241, Tab. 1, ZB-H1; ZB-V: Sec. 6), on several smaller
    stages as interleaving divides it; DualPipeV (arXiv 2412.19437, Tab. 2, of half as many ranks). Local learning has
    none after the fill.

    Args:
        schedule: A name of `SCHEDULES`.
        workload: Of its times only the ratio of forward to backward counts, and that for zero bubble only.

    Returns:
        The share; `None` where the formula does not hold: fewer micro-batches than stages for zero bubble, micro-
        batches that are no multiple of the stages for what is interleaved, forwards and parts of backwards that differ
        in time for `zbv` and `dualpipev`; and for `ppll_delayed`.
    """
    stages, microbatches = workload.times.num_stages, workload.microbatches
    forward, backward = sum(workload.times.forward), sum(workload.times.backward)
    weight = backward * workload.weight_share
    put_off = (forward + (backward - weight) - weight) / (forward + backward)
    idle: dict[str, float | None] = {
        "ppll": 0.0,
        "gpipe": 1.0,
        "1f1b": 1.0,
        "interleaved": None if microbatches % stages else 1 / workload.virtual_stages,
        "zero-bubble": None if microbatches < stages else put_off,
        "interleaved_zb": None if microbatches % stages else put_off / workload.virtual_stages,
    }
    if math.isclose(forward, weight) and math.isclose(backward, 2 * weight):
        idle["zbv"] = 0.0 if microbatches >= 2 * stages - 1 else None
        # A forward and backward, a backward, and three parts less: of stages of half a rank
        idle["dualpipev"] = (forward + backward + backward - 3 * weight) / 2 / (forward + backward)
    share = idle.get(schedule)
    if share is None:
        return None
    return (stages - 1) * share / (microbatches + (stages - 1) * share)
