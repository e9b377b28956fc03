"""LoPT on TRL's SFT trainer."""

import inspect
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from lopt_hf.local.objectives import LocalObjective
from lopt_hf.trainers.checks import check_model, check_sft_dataset
from lopt_hf.trainers.conversion import local_config
from lopt_hf.trainers.lopt_config import LoPTConfig
from lopt_hf.trainers.lopt_mixin import LOPT_PAPER, LoPTMixin

__all__ = ["LoPTTrainer"]


class LoPTTrainer(LoPTMixin, SFTTrainer):
    """Trainer for LoPT, local-learning post-training (https://huggingface.co/papers/2605.04913).

    The decoder is cut into blocks. The task loss trains the last block; every earlier block learns to keep its input
    reconstructible from its output, and no gradient crosses a boundary.

    The only change with respect to [`~trl.SFTTrainer`] is what `LoPTMixin` adds; every argument of the parent is
    accepted and means the same, and the saved model is a stock checkpoint.

    Args:
        model: Model id, local folder, or a `transformers` causal language model, PEFT-wrapped or not.
        args: Training arguments. Default: `LoPTConfig` with the output folder `<model>-LoPT`.
        local_objective: The early blocks' objective. Default: the one that `args.local_objective` names.
        *sft_args: The remaining positional arguments of `SFTTrainer`.
        **sft_kwargs: The keyword arguments of `SFTTrainer`.

    Example:

    ```python
    from datasets import load_dataset
    from lopt_hf import LoPTConfig, LoPTTrainer

    trainer = LoPTTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=LoPTConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _tag_names = ["trl", "sft", "lopt", "local-learning"]
    _name = "LoPT"
    _paper = LOPT_PAPER

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments | None = None,
        *sft_args: Any,
        local_objective: LocalObjective | None = None,
        **sft_kwargs: Any,
    ) -> None:
        args = local_config(model, args, LoPTConfig, "LoPT")
        given = (
            inspect.signature(SFTTrainer.__init__).bind_partial(self, model, args, *sft_args, **sft_kwargs).arguments
        )
        check_model(model, args, given.get("peft_config"), given.get("quantization_config"))
        check_sft_dataset(given.get("train_dataset"), args, given.get("formatting_func"))
        super().__init__(model, args, *sft_args, local_objective=local_objective, **sft_kwargs)
