"""The task loss, and that of MLAAN's early blocks, on a batch of which only the shape is known.

The task loss as TRL's SFT trainer computes it, in the form that it has on a GPU.

Its fused LM head never builds the logits of all tokens: it works on tiles of 4,096 tokens by 32,768 entries of the
vocabulary. On a GPU Triton kernels change a tile in place and the products are added up in fp32 as they are computed;
elsewhere plain torch makes copies of the tile in fp32, which no GPU would ever hold.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from lopt_hf.common.upstream.trl import add_fused_lm_head, chunked_logprob, trainer_utils
from lopt_hf.local import readout
from lopt_hf.local.objectives import LocalBatch
from lopt_hf.planner.memory import MemoryMeter

__all__ = ["add_task_loss", "every_token_labelled", "few_chunks", "loss_as_on_gpu", "metered_loss"]

SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")  # TRL 1.16, SFTTrainer


def add_task_loss(model: PreTrainedModel) -> None:
    """Gives a model TRL's fused LM head, before PEFT wraps it."""
    add_fused_lm_head(model, outputs=SFT_OUTPUTS)


@contextlib.contextmanager
def metered_loss(meter: MemoryMeter) -> Iterator[None]:
    """Lets the meter count what LM head and loss hold as `"logits"`."""
    task_loss = _metered(chunked_logprob.ChunkedLogProbFunction, meter)
    local_loss = _metered(readout.ChunkedCrossEntropy, meter)
    with (
        mock.patch.object(trainer_utils, "_ChunkedLogProbFunction", task_loss),
        mock.patch.object(readout, "ChunkedCrossEntropy", local_loss),
    ):
        yield


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


@contextlib.contextmanager
def every_token_labelled() -> Iterator[None]:
    """Lets the local losses take a label for every token; which ones have one cannot be read off a fake tensor."""

    def tokens(output_BTD: torch.Tensor, batch: LocalBatch) -> tuple[torch.Tensor, torch.Tensor]:
        labels_BT = batch.inputs["labels"][:, 1:]
        rows_BT, positions_BT = torch.meshgrid(*map(torch.arange, labels_BT.shape), indexing="ij")
        where = rows_BT.flatten(), positions_BT.flatten()
        return output_BTD[:, :-1][where], labels_BT[where]

    with mock.patch.object(readout, "counted_tokens", tokens):
        yield


@contextlib.contextmanager
def few_chunks(meter: MemoryMeter) -> Iterator[None]:
    """Lets the local losses compute their first two chunks and the last; those between cost what the second does."""

    def chunks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        all_chunks = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
        for chunk in all_chunks[:2]:
            before = meter.work
            yield chunk
        meter.work += (meter.work - before) * len(all_chunks[2:-1])
        yield from all_chunks[2:][-1:]

    with mock.patch.object(readout, "in_chunks", chunks):
        yield


@contextlib.contextmanager
def loss_as_on_gpu(meter: MemoryMeter) -> Iterator[None]:
    """Replaces the parts of TRL's kernel that need more memory on a CPU by ones that need what a GPU needs."""

    def fold(*args: Any, **kwargs: Any) -> None:
        """Reads and writes the tile in place, and some numbers per token."""

    def add_product(acc: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        meter.count_product(left, right)

    with (
        mock.patch.object(chunked_logprob, "_forward_tile", fold),
        mock.patch.object(chunked_logprob, "_backward_tile", fold),
        mock.patch.object(chunked_logprob, "_addmm_fp32", add_product),
    ):
        yield
