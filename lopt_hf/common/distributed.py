"""Gradient all-reduce for blocks whose backward the DDP reducer must not see."""

import atexit
import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["GradientReducer", "broadcast_parameters", "end_training", "new_group"]


def end_training(trainer: Any) -> None:
    """Ends a trainer's trackers and the process group, at the very end of a script; the trainer is of no use then.

    As `Trainer.end`, after DDP's reducer has gone: were it the last to let go of a gloo group, it would wait, with the
    interpreter locked, for the group's threads, which may need the interpreter to give back a tensor.

    Args:
        trainer: A `Trainer`.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()
    trainer.end()


def broadcast_parameters(
    parameters: Iterable[nn.Parameter], source: int = 0, group: dist.ProcessGroup | None = None
) -> None:
    """Copies parameters from one rank to all others: DDP leaves out of its own broadcast what it ignores."""
    for parameter in parameters:
        dist.broadcast(parameter.data, src=source, group=group)


def new_group(ranks: list[int] | None = None) -> dist.ProcessGroup:
    """Makes a process group. Every process must call it, also one outside, which must not use what it gets.

    Args:
        ranks: The members. Default: all.
    """
    group: Any = dist.new_group(ranks)  # from torch 2.14 on its type names what a process outside gets, too
    return group


class GradientReducer:
    """Averages gradients over all ranks in buckets, asynchronously.

    `start` returns at once, so that the communication of an early block overlaps the later blocks' work; `wait` must
    come before the gradients are read. It has a process group of its own: in the default one the small collectives of
    the trainer's metrics would wait behind the buckets, and the host with them.

    Args:
        bucket_bytes: Size from which a bucket is sent (DDP's own default: 25 MiB).
        group: Average over these ranks, in this very group. Default: all ranks, in a group of its own.
    """

    def __init__(self, bucket_bytes: int = 25 * 2**20, group: dist.ProcessGroup | None = None) -> None:
        self.bucket_bytes = bucket_bytes
        self._group = group
        self._pending: list[tuple[dist.Work, torch.Tensor, list[torch.Tensor]]] = []

    def start(self, parameters: Iterable[nn.Parameter], may_differ: bool = False) -> None:
        """Starts averaging the gradients of those parameters that have one.

        Args:
            parameters: The parameters, in the same order on every rank.
            may_differ: Whether it depends on the rank's batch which of them have a gradient, as those of a vision
                tower do on images; then what has one on some rank counts as zero on the others.
        """
        if self._group is None:
            self._group = new_group()
            atexit.register(_close, self._group)
        parameters = list(parameters)
        if may_differ:
            self._fill_in_zeros(parameters)
        for gradients in self._buckets(parameters):
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(dist.get_world_size(self._group))
            work = dist.all_reduce(flat, group=self._group, async_op=True)
            self._pending.append((work, flat, gradients))

    def _fill_in_zeros(self, parameters: list[nn.Parameter]) -> None:
        """Gives a gradient of zeros to each parameter that has one on another rank only."""
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        if not learning:
            return
        has_one = torch.tensor([p.grad is not None for p in learning], dtype=torch.uint8, device=learning[0].device)
        dist.all_reduce(has_one, dist.ReduceOp.MAX, group=self._group)
        for parameter, is_somewhere in zip(learning, has_one.tolist(), strict=True):
            if is_somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def wait(self) -> None:
        """Waits for what was started and puts the averages into the gradients."""
        for work, flat, gradients in self._pending:
            work.wait()
            for gradient, average in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(average.view_as(gradient))
        self._pending.clear()

    def _buckets(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        bucket: list[torch.Tensor] = []
        size = 0
        # From the last parameter on: the order in which backward fills them.
        for parameter in reversed(list(parameters)):
            gradient = parameter.grad
            if gradient is None:
                continue
            if bucket and (gradient.dtype != bucket[0].dtype or size >= self.bucket_bytes):
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.numel() * gradient.element_size()
        if bucket:
            yield bucket


def _close(group: dist.ProcessGroup) -> None:
    """Ends gloo's threads while there is an interpreter: a bucket that one gives back later aborts the process."""
    if dist.is_initialized() and dist.get_backend(group) == "gloo":
        dist.destroy_process_group(group)
