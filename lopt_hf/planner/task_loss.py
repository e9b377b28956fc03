"""The task loss as TRL's SFT trainer computes it, in the form that it has on a GPU.

Its fused LM head never builds the logits of all tokens: it works on tiles of 4,096 tokens by 32,768 entries of the
vocabulary. On a GPU Triton kernels change a tile in place and the products are added up in fp32 as they are computed;
elsewhere plain torch makes copies of the tile in fp32, which no GPU would ever hold.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import trl.trainer.utils
from transformers import PreTrainedModel
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from lopt_hf.planner.memory import MemoryMeter

__all__ = ["add_task_loss", "loss_as_on_gpu", "metered_loss"]

SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")  # TRL 1.16, SFTTrainer


def add_task_loss(model: PreTrainedModel) -> None:
    """Gives a model TRL's fused LM head, before PEFT wraps it."""
    add_fused_lm_head(model, outputs=SFT_OUTPUTS)


@contextlib.contextmanager
def metered_loss(meter: MemoryMeter) -> Iterator[None]:
    """Lets the meter count what LM head and loss hold as `"logits"`."""
    original = chunked_logprob.ChunkedLogProbFunction

    class Metered(original):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with meter.region("logits"):
                return original.forward(ctx, *args)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            with meter.region("logits"):
                return original.backward(ctx, *gradients)

    with mock.patch.object(trl.trainer.utils, "_ChunkedLogProbFunction", Metered):
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
