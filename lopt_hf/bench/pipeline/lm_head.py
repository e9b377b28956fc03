"""The LM head of `--lm-head logits`: TRL's fused one, but on the logits of all tokens at once.

Shapes: N tokens, D hidden channels, V entries of the vocabulary.
"""

from typing import Any

import torch
from torch.nn import functional as F

from lopt_hf.common.upstream.trl import trainer_utils

__all__ = ["compute_all_logits"]

Outputs = tuple[torch.Tensor, torch.Tensor | None, None, None, torch.Tensor | None]


class _AllLogits:
    """What TRL's `ChunkedLogProbFunction` returns, by operations whose gradients are autograd's.

    The logits and their softmax live until backward, where nothing is computed again; and the gradients of hidden
    states and of the head's weights are separate operations, which a schedule can run apart.
    """

    @staticmethod
    def apply(
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> Outputs:
        """The log-probabilities of the targets (N,), and of `outputs` entropy and whether a target is the argmax."""
        logits_NV = F.linear(hidden_ND, weight_VD, bias_V).float()
        if logit_scale != 1:
            logits_NV = logits_NV * logit_scale
        if final_logit_softcapping is not None:
            logits_NV = final_logit_softcapping * torch.tanh(logits_NV / final_logit_softcapping)
        if temperature != 1:
            logits_NV = logits_NV / temperature
        log_probs_NV = logits_NV.log_softmax(-1)
        entropy_N = is_top1_N = None
        with torch.no_grad():
            if "entropy" in outputs:
                entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(-1)
            if "is_top1" in outputs:
                is_top1_N = logits_NV.argmax(-1) == targets_N
        return log_probs_NV.gather(-1, targets_N[:, None])[:, 0], entropy_N, None, None, is_top1_N


def compute_all_logits() -> None:
    """Replaces the kernel of TRL's fused LM head in this process, for all models and trainers."""
    replaced: Any = trainer_utils
    replaced._ChunkedLogProbFunction = _AllLogits
