"""MLAAN on TRL's SFT trainer."""

import inspect
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from lopt_hf.mlaan.config import MLAANConfig
from lopt_hf.mlaan.mixin import MLAAN_PAPER, MLAANMixin
from lopt_hf.trainers.checks import check_model, check_sft_dataset
from lopt_hf.trainers.conversion import local_config

__all__ = ["MLAANTrainer"]


class MLAANTrainer(MLAANMixin, SFTTrainer):
    """Trainer for MLAAN, multilaminar leap augmented auxiliary networks (https://huggingface.co/papers/2406.16633).

    The decoder is cut into blocks. The task loss trains the last blocks; every earlier block learns the next token
    too, through an auxiliary that leaps to copies of a few deeper layers. A loss reaches a window of adjacent blocks.

    The only change with respect to [`~trl.SFTTrainer`] is what `MLAANMixin` adds; every argument of the parent is
    accepted and means the same, and the saved model is a stock checkpoint without the auxiliaries.

    Args:
        model: Model id, local folder, or a `transformers` causal language model, PEFT-wrapped or not.
        args: Training arguments. Default: `MLAANConfig` with the output folder `<model>-MLAAN`.
        *sft_args: The remaining positional arguments of `SFTTrainer`.
        **sft_kwargs: The keyword arguments of `SFTTrainer`.

    Example:

    ```python
    from datasets import load_dataset
    from lopt_hf import MLAANConfig, MLAANTrainer

    trainer = MLAANTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=MLAANConfig(output_dir="out", num_blocks=4, window=2),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _tag_names = ["trl", "sft", "mlaan", "local-learning"]
    _name = "MLAAN"
    _paper = MLAAN_PAPER

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments | None = None,
        *sft_args: Any,
        **sft_kwargs: Any,
    ) -> None:
        args = local_config(model, args, MLAANConfig, "MLAAN")
        given = (
            inspect.signature(SFTTrainer.__init__).bind_partial(self, model, args, *sft_args, **sft_kwargs).arguments
        )
        check_model(model, args, given.get("peft_config"), given.get("quantization_config"))
        check_sft_dataset(given.get("train_dataset"), args, given.get("formatting_func"))
        super().__init__(model, args, *sft_args, **sft_kwargs)
