"""The task loss, and the local losses through a readout, on a batch of which only the shape is known.

The task loss as TRL's SFT trainer computes it, in the form that it has on a GPU.

Its fused LM head never builds the logits of all tokens: it works on tiles of 4,096 tokens by 32,768 entries of the
vocabulary. On a GPU Triton kernels change a tile in place and the products are added up in fp32 as they are computed;
elsewhere plain torch makes copies of the tile in fp32, which no GPU would ever hold.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lopt_hf.common.upstream.trl import chunked_logprob, trainer_utils
from lopt_hf.local.objectives import LocalBatch
from lopt_hf.local.readout import ChunkedCrossEntropy, TokenLoss
from lopt_hf.planner.memory import MemoryMeter

__all__ = ["PlannedTokenLoss", "loss_as_on_gpu", "metered_loss"]


@contextlib.contextmanager
def metered_loss(meter: MemoryMeter) -> Iterator[None]:
    """Lets the meter count what LM head and task loss hold as `"logits"`."""
    task_loss = _metered(chunked_logprob.ChunkedLogProbFunction, meter)
    with _replaced(trainer_utils, _ChunkedLogProbFunction=task_loss):
        yield


@contextlib.contextmanager
def _replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Gives names of one of TRL's modules other values for a while."""
    originals = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(module, name, value)


def _metered(original: type[torch.autograd.Function], meter: MemoryMeter) -> type[torch.autograd.Function]:
    class Metered(original):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with meter.region("logits"):
                return original.forward(ctx, *args)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            with meter.region("logits"):
                return original.backward(ctx, *gradients)

    return Metered


class PlannedTokenLoss(TokenLoss):
    """The local losses' cross-entropy on fake tensors: every token has a label, and only some chunks are computed.

    Which tokens have a label cannot be read off a fake tensor. Of the chunks the first two and the last are computed;
    those between cost what the second does.

    Args:
        meter: What counts the logits as such.
    """

    def __init__(self, meter: MemoryMeter) -> None:
        self.meter = meter
        self._function: Any = _metered(ChunkedCrossEntropy, meter)

    def counted(self, output_BTD: torch.Tensor, batch: LocalBatch) -> tuple[torch.Tensor, torch.Tensor]:
        labels_BT = batch.inputs["labels"][:, 1:]
        rows_BT, positions_BT = torch.meshgrid(*map(torch.arange, labels_BT.shape), indexing="ij")
        where = rows_BT.flatten(), positions_BT.flatten()
        return output_BTD[:, :-1][where], labels_BT[where]

    def chunks(self, size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        all_chunks = list(super().chunks(size, *tensors))
        for chunk in all_chunks[:2]:
            before = self.meter.work
            yield chunk
        self.meter.work += (self.meter.work - before) * len(all_chunks[2:-1])
        yield from all_chunks[2:][-1:]

    def total(self, hidden_ND: torch.Tensor, labels_N: torch.Tensor, readout: nn.Module, size: int) -> torch.Tensor:
        total: torch.Tensor = self._function.apply(hidden_ND, labels_N, readout, partial(self.chunks, size))
        return total


@contextlib.contextmanager
def loss_as_on_gpu(meter: MemoryMeter) -> Iterator[None]:
    """Replaces the parts of TRL's kernel that need more memory on a CPU by ones that need what a GPU needs."""

    def fold(*args: Any, **kwargs: Any) -> None:
        """Reads and writes the tile in place, and some numbers per token."""

    def add_product(acc: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        meter.count_product(left, right)

    with _replaced(chunked_logprob, _forward_tile=fold, _backward_tile=fold, _addmm_fp32=add_product):
        yield
