"""Orders of schedules in the form of a V: rank r of K has the stages r and 2 K - 1 - r.

The first rank so has the first stage and the last, and begins the backward of a micro-batch as soon as its forward is
through.
"""

import numpy as np

from lopt_hf.pipeline.simulator.schedule_engine import Integers
from lopt_hf.pipeline.simulator.schedule_kinds import Kind, number_actions

__all__ = ["dualpipev_order", "zbv_order"]


def zbv_order(rank: int, ranks: int, chunks: int, microbatches: int) -> Integers:
    """ZB-V (arXiv 2401.10241, Sec. 6), as torch's `ScheduleZBVZeroBubble` has it.

    It is that of at least as many micro-batches as fill the pipeline, 2 K - 1, without those that are not there.
    """
    filled = max(2 * ranks - 1, microbatches)
    order = number_actions(
        ("F0", 2 * (ranks - rank) - 1),
        ("F1 F0", rank),
        ("F1 I1 W1", ranks - rank),
        ("F0 I0 W0 F1 I1 W1", filled - 2 * ranks + 1 + rank),
        ("I0 W0 F1 I1 W1", ranks - 1 - rank),
        ("I0 I1", rank),
        ("I0 W0", ranks - rank),
        ("W1", rank),
        ("W0", rank),
    )
    return order[:, order[2] < microbatches]


def dualpipev_order(rank: int, ranks: int, chunks: int, microbatches: int) -> Integers:
    """DualPipeV (arXiv 2412.19437, Sec. 3.2.1, halved), as torch's `ScheduleDualPipeV` has it.

    In the steady state forwards of one stage and backwards of the other come in pairs; the last backwards put off
    their part for the weights. torch runs the two of a pair one after the other, and then sends what both have made.
    """
    after = ranks - 1 - rank
    last = ["1", "0"] * (rank + 1)  # the backwards after all forwards: the first half in one, the second in two parts
    whole, in_parts = last[: rank + 1], last[rank + 1 :]
    put_off = [*in_parts, *["0"] * after]  # each part for the weights comes `rank + 1` parts for the inputs later
    order = number_actions(
        ("F0", 2 * after),
        ("F0 F1", rank + 1),
        ("I1 W1 F1", after),
        ("F0 B1 F1 B0", microbatches - 2 * ranks + rank + 1),
        ("B1 F1 B0", after),
        (" ".join(f"B{stage}" for stage in whole), 1),
        (" ".join(f"I{stage}" for stage in in_parts), 1),
        *((f"W{stage} I0", 1) for stage in put_off[:after]),
        *((f"W{stage}", 1) for stage in put_off[after:]),
    )
    return _filled_up(order, 6 * microbatches)


def _filled_up(order: Integers, actions: int) -> Integers:
    """Ranks with fewer backwards in two parts have fewer actions: nothing takes the place of the rest."""
    rest = actions - order.shape[1]
    return np.concatenate([order, np.tile([[Kind.NOTHING], [0], [0]], rest)], axis=1)
