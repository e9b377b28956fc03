"""TRL's GRPO trainer, with a check of the private method that ours overrides."""

from trl import GRPOTrainer

from lopt_hf.common.upstream.trainers import OVERRIDDEN_GRPO
from lopt_hf.common.upstream.trl import TRL

__all__ = ["GRPOTrainer"]

TRL.check(GRPOTrainer, *OVERRIDDEN_GRPO)
