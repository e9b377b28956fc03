"""The private methods of transformers' and TRL's trainers that the package's trainers override, or call.

An override of a method that the parent no longer has would never be called, without a word: what it does, such as
writing the heads beside a checkpoint, would be lost. So each is checked when the trainers are imported. Their
signatures are compared by `tests/common/test_upstream.py`.
"""

from collections.abc import Iterable, Mapping

from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from lopt_hf.common.upstream.transformers import TRANSFORMERS

__all__ = [
    "CALLED",
    "FIELDS",
    "OPTIMIZER_NAME",
    "OVERRIDDEN",
    "OVERRIDDEN_GRPO",
    "SCHEDULER_NAME",
    "TRAINER_STATE_NAME",
]

# transformers 5.23 to 5.24, `Trainer`
OVERRIDDEN = (
    "_clip_grad_norm",
    "_get_dataloader",
    "_get_grad_norm",
    "_get_num_items_in_batch",
    "_get_output_dir",
    "_issue_warnings_after_load",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_prepare_for_training",
    "_push_from_checkpoint",
    "_run_epoch",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_wrap_model",
)
CALLED = ("_get_collator_with_removed_columns", "_move_model_to_device", "_prepare_inputs", "_save_rng_state")

# TRL 1.16
OVERRIDDEN_GRPO = ("_generate_single_turn",)

# What the parents' own methods set on themselves: only an instance has it. `_name`, `_paper` and `_tag_names` feed
# TRL's model card.
FIELDS: Mapping[str, Iterable[str]] = {
    "Trainer": ("_globalstep_last_logged", "_total_loss_scalar", "_tr_loss"),
    "SFTTrainer": ("_metrics", "_name", "_paper", "_tag_names", "_total_train_tokens"),
    "DPOTrainer": ("_metrics", "_name", "_paper", "_tag_names", "_total_train_tokens"),
    "GRPOTrainer": ("_buffered_inputs", "_metrics", "_name", "_paper", "_step", "_tag_names", "_total_train_tokens"),
}


TRANSFORMERS.check(Trainer, *OVERRIDDEN, *CALLED)
