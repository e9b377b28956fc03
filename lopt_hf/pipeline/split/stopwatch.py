"""Timing of a part of a model, forward and backward, as it runs in training."""

import ctypes
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

__all__ = ["LEAST_SECONDS", "NOTHING", "PartCost", "Stopwatch", "num_elements"]

WARMUP_RUNS = 2  # ours: the first run allocates, the second fills the caches
LEAST_SECONDS = 1.0  # ours: the error of a layer's time is multiplied by the number of layers


@dataclass(frozen=True)
class PartCost:
    """Cost of a part of the model.

    Attributes:
        forward: Seconds per micro-batch.
        backward: Seconds per micro-batch; with activation checkpointing, its second forward included.
        num_trainable: Parameters that the optimizer updates.
    """

    forward: float
    backward: float
    num_trainable: int


NOTHING = PartCost(0.0, 0.0, 0)


@dataclass(frozen=True)
class Stopwatch:
    """Runs a part until its median time can be trusted.

    Attributes:
        device: Where the part is.
        autocast: Data type of the arithmetic under autocast; `None`: that of the weights.
        repeats: Timed runs, at least.
        least_seconds: Time to spend, at least.
    """

    device: torch.device
    autocast: torch.dtype | None
    repeats: int
    least_seconds: float

    def precision(self) -> torch.autocast:
        """Makes the autocast context that a part runs in."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def now(self) -> float:
        """Returns the time in seconds, once the device has done its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return perf_counter()

    def measure(self, forward: Callable[[], torch.Tensor], parameters: Sequence[nn.Parameter]) -> PartCost:
        """Times a forward and its backward; gradients are made anew each time, as after `zero_grad`."""
        runs = self._repeat(lambda: self.run(forward, parameters))
        forward_seconds, backward_seconds = (statistics.median(times) for times in zip(*runs, strict=True))
        return PartCost(forward_seconds, backward_seconds, num_elements(parameters))

    def run(self, forward: Callable[[], torch.Tensor], parameters: Sequence[nn.Parameter]) -> tuple[float, float]:
        """Runs a forward and its backward once; returns the seconds of each."""
        for parameter in parameters:
            parameter.grad = None
        if self.device.type == "cpu":
            _return_freed_memory()
        start = self.now()
        with self.precision():
            output = forward()
        gradient = torch.full_like(output, 1 / output.numel())
        middle = self.now()
        if output.requires_grad:
            output.backward(gradient)
        return middle - start, self.now() - middle

    def measure_step(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> float:
        """Times clipping and a step on the gradients that are there."""

        def step() -> tuple[float]:
            start = self.now()
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            return (self.now() - start,)

        return statistics.median(seconds for (seconds,) in self._repeat(step))

    def _repeat(self, run: Callable[[], tuple[float, ...]]) -> list[tuple[float, ...]]:
        for _ in range(WARMUP_RUNS):
            run()
        runs: list[tuple[float, ...]] = []
        while len(runs) < self.repeats or sum(map(sum, runs)) < self.least_seconds:
            runs.append(run())
        return runs


def _return_freed_memory() -> None:
    """Gives freed memory back to the system, as glibc does by itself in the course of a whole stage's step.

    A part that is run again and again would find its pages there, while in a training step it gets new ones: up to
    half of the time of SmolLM2's LM head. With `MALLOC_TRIM_THRESHOLD_` set, glibc keeps them in training too.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        ctypes.CDLL(None).malloc_trim(0)


def num_elements(parameters: Iterable[nn.Parameter]) -> int:
    """Returns the number of elements of parameters."""
    return sum(parameter.numel() for parameter in parameters)
