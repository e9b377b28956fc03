"""Local learning on TRL's SFT trainer."""

import inspect
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from lopt_hf.local.methods.base import Method
from lopt_hf.local.methods.lopt import LOPT_PAPER, LoPT
from lopt_hf.local.methods.mlaan.method import MLAAN_PAPER
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.trainers.checks import check_model, check_sft_dataset
from lopt_hf.trainers.configs import LoPTConfig, MLAANConfig, local_config
from lopt_hf.trainers.mixin import LocalLearningMixin

__all__ = ["LoPTTrainer", "LocalSFTTrainer", "MLAANTrainer"]


class LocalSFTTrainer(LocalLearningMixin, SFTTrainer):
    """Trainer for supervised fine-tuning by any method of local learning.

    The only change with respect to [`~trl.SFTTrainer`] is what local learning adds; every argument of the
    parent is accepted and means the same, and the saved model is a stock checkpoint.

    Args:
        model: Model id, local folder, or a `transformers` causal language model, PEFT-wrapped or not.
        args: Training arguments that mix in a method's (`LocalTrainingArguments`).
        *sft_args: The remaining positional arguments of `SFTTrainer`.
        method: The method. Default: the one that the arguments are of.
        **sft_kwargs: The keyword arguments of `SFTTrainer`.
    """

    _tag_names = ["trl", "sft", "local-learning"]
    _name = "Local SFT"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: Any,
        *sft_args: Any,
        method: Method | None = None,
        **sft_kwargs: Any,
    ) -> None:
        parameters = inspect.signature(SFTTrainer.__init__)
        given = parameters.bind_partial(self, model, args, *sft_args, **sft_kwargs).arguments
        check_model(model, args, given.get("peft_config"), given.get("quantization_config"))
        check_sft_dataset(given.get("train_dataset"), args, given.get("formatting_func"))
        super().__init__(model, args, *sft_args, method=method, **sft_kwargs)


class LoPTTrainer(LocalSFTTrainer):
    """Trainer for LoPT, local-learning post-training (https://huggingface.co/papers/2605.04913).

    The decoder is cut into blocks. The task loss trains the last block, or as many of the last blocks as `task_reach`
    says at each step. Earlier blocks learn from `local_objective`, by default to keep their input reconstructible from
    their output, or stand still.

    The only change with respect to [`~trl.SFTTrainer`] is what local learning adds; every argument of the parent is
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
        method = None if local_objective is None else LoPT(local_objective)
        super().__init__(model, local_config(model, args, LoPTConfig, "LoPT"), *sft_args, method=method, **sft_kwargs)


class MLAANTrainer(LocalSFTTrainer):
    """Trainer for MLAAN, multilaminar leap augmented auxiliary networks (https://huggingface.co/papers/2406.16633).

    The decoder is cut into blocks. The task loss trains the last blocks; every earlier block learns the next token
    too, through an auxiliary that leaps to copies of a few deeper layers. A loss reaches a window of adjacent blocks.

    The only change with respect to [`~trl.SFTTrainer`] is what local learning adds; every argument of the parent is
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
        self, model: str | PreTrainedModel, args: TrainingArguments | None = None, *sft_args: Any, **sft_kwargs: Any
    ) -> None:
        super().__init__(model, local_config(model, args, MLAANConfig, "MLAAN"), *sft_args, **sft_kwargs)
