"""Clipping and stepping block by block: what is clipped together, and which of it has taken the step under way."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from lopt_hf.local.learner_events import LearnerEvents
from lopt_hf.local.stepping import ClipGroup, GradientsComplete, stepping_only

__all__ = ["BlockSteps", "groups_of_blocks", "groups_of_parts"]


def groups_of_blocks(learning: Sequence[list[nn.Parameter]]) -> list[ClipGroup]:
    """Makes a group of each block's parameters."""
    return [ClipGroup(f"block {index}", index, parameters) for index, parameters in enumerate(learning)]


def groups_of_parts(learning: Sequence[list[nn.Parameter]], layers: Iterable[nn.Module]) -> list[ClipGroup]:
    """Makes two groups of each block's parameters, that one first which a backward completes first.

    Args:
        learning: Each block's parameters.
        layers: The modules whose parameters make the one group: decoder layers, and heads, which belong to them.
    """
    in_layers = {id(parameter) for module in layers for parameter in module.parameters()}
    groups: list[ClipGroup] = []
    for index, parameters in enumerate(learning):
        inside, outside = ([p for p in parameters if (id(p) in in_layers) is where] for where in (True, False))
        own = ClipGroup(f"block {index}'s layers", index, inside)
        others = ClipGroup(f"block {index} but its layers", index, outside)
        groups += [others, own] if index == len(learning) - 1 else [own, others]
    return groups


class BlockSteps:
    """The clipping of a learner's gradients, and the steps that blocks take by themselves.

    Args:
        groups: Returns what is clipped and stepped together.
        events: What to ask of whoever runs the steps.
        device: Where the norms of gradients go.
        max_grad_norm: Where a group that steps by itself is clipped; 0 does not clip.
    """

    def __init__(
        self, groups: Callable[[], list[ClipGroup]], events: LearnerEvents, device: torch.device, max_grad_norm: float
    ) -> None:
        self._groups = groups
        self._events = events
        self._device = device
        self._max_grad_norm = max_grad_norm if max_grad_norm > 0 else math.inf
        self._holds_back = False
        self._stepped_norms: dict[str, torch.Tensor] = {}  # of the groups that have taken the step under way, by name

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clips each group's gradients, and ends the step under way; returns the norm of all of them before."""
        norms = [self._clip_group(group, max_norm) for group in self._groups()]
        return torch.linalg.vector_norm(torch.stack(norms))

    def step(self, index: int) -> None:
        """Clips and applies what has not stepped yet of a block's gradients, and frees them.

        There is one torch optimizer as ever: a step of some parameters is a call of it that sees their gradients
        only. So optimizer, scheduler and checkpoints are what they are without, and clipping apart leaves nothing by
        which one step could change another's.
        """
        for group in self._groups():
            if group.block == index and group.name not in self._stepped_norms:
                self._step_group(group)

    @contextlib.contextmanager
    def stepping_early(self) -> Iterator[None]:
        """Makes a context in which a group steps as soon as its gradients are complete, before its block's others."""
        waiting = [
            GradientsComplete(group.parameters, partial(self._step_group, group), lambda: not self._holds_back)
            for group, next_group in pairwise(self._groups())
            if group.block == next_group.block
        ]
        try:
            yield
        finally:
            for completion in waiting:
                completion.remove()

    @contextlib.contextmanager
    def holding_back(self) -> Iterator[None]:
        """Makes a context for a backward that completes no gradient, since more will be added to the same ones."""
        self._holds_back = True
        try:
            yield
        finally:
            self._holds_back = False

    def check_first_backward(self, index: int) -> None:
        """Raises `RuntimeError` if a block that has taken the step under way is to get gradients again."""
        if any(group.block == index and group.name in self._stepped_norms for group in self._groups()):
            raise RuntimeError(
                f"local_step=True: block {index} runs forward with gradients a second time after its step. This "
                "trainer's loss takes several forwards for each micro-batch; set local_step to False."
            )

    def forget(self) -> None:
        """Forgets the step that an exception ended."""
        self._stepped_norms.clear()

    def _step_group(self, group: ClipGroup) -> None:
        assert self._events.optimizer is not None
        norm = self._clip_group(group, self._max_grad_norm)
        self._events.check_finite(f"grad_norm of {group.name}", norm)
        optimizer = self._events.optimizer()
        with stepping_only(optimizer, group.parameters):
            optimizer.step()
        for parameter in group.parameters:
            parameter.grad = None
        self._stepped_norms[group.name] = norm

    def _clip_group(self, group: ClipGroup, max_norm: float) -> torch.Tensor:
        if group.name in self._stepped_norms:
            return self._stepped_norms.pop(group.name)
        return group.clip(max_norm).to(self._device)
