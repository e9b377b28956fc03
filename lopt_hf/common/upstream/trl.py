"""What the package takes from the inside of TRL, its trainers aside: the LM head that never builds all logits."""

import trl.trainer.utils as trainer_utils
from transformers import PreTrainedModel

from lopt_hf.common.upstream.guard import Upstream

__all__ = ["TRL", "add_sft_head", "chunked_logprob", "trainer_utils"]

TRL = Upstream("trl", "1.16", "1.17")

with TRL.names():
    from trl.kernels import chunked_logprob
    from trl.trainer.utils import add_fused_lm_head

TRL.check(trainer_utils, "_ChunkedLogProbFunction")
TRL.check(chunked_logprob, "ChunkedLogProbFunction", "_addmm_fp32", "_backward_tile", "_forward_tile")


def add_sft_head(model: PreTrainedModel) -> None:
    """Gives a model, before PEFT wraps it, the fused LM head that `SFTTrainer` of TRL 1.16 gives it."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
