"""What the ranks of a pipeline do, and orders of it in a short notation."""

from enum import IntEnum

import numpy as np

from lopt_hf.pipeline.simulator.schedule_engine import Integers

__all__ = ["Kind", "number_actions"]


class Kind(IntEnum):
    """Kinds of actions, by what they compute."""

    FORWARD = 0
    BACKWARD = 1  # with respect to input and weights
    INPUT = 2  # backward with respect to the input only
    WEIGHT = 3  # backward with respect to the weights, some time after `INPUT`
    LOCAL = 4  # the local objective of a block, forward and backward
    OPTIMIZER = 5
    NOTHING = 6  # takes no time: for ranks that have less to do than others


LETTERS = {"F": Kind.FORWARD, "B": Kind.BACKWARD, "I": Kind.INPUT, "W": Kind.WEIGHT}


def number_actions(*parts: tuple[str, int]) -> Integers:
    """Makes the order of a rank with two stages; each stage takes its micro-batches one after the other.

    Args:
        *parts: Actions such as `"F0 I1 W1"`, which are a letter of `LETTERS` and the first or the second stage of the
            rank, and how often they follow one another.

    Returns:
        Kind, stage of the rank, and micro-batch of each action, (3, actions).
    """
    kinds, stages = np.concatenate([np.tile(_read(text), times) for text, times in parts], axis=1)
    microbatches = np.empty_like(kinds)
    for stage in (0, 1):
        own = stages == stage
        inputs, backwards = own & (kinds == Kind.INPUT), own & np.isin(kinds, (Kind.BACKWARD, Kind.INPUT))
        for counted in (own & (kinds == Kind.FORWARD), backwards):
            microbatches[counted] = np.arange(counted.sum())
        microbatches[own & (kinds == Kind.WEIGHT)] = microbatches[inputs]  # those put off, in their order
    return np.stack([kinds, stages, microbatches])


def _read(text: str) -> Integers:
    actions = text.split()
    return np.array([[LETTERS[action[0]] for action in actions], [int(action[1]) for action in actions]]).reshape(
        2, -1
    )
