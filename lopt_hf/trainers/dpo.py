"""Local learning on TRL's DPO trainer."""

import inspect
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from trl import DPOTrainer

from lopt_hf.local.methods.base import Method
from lopt_hf.local.methods.lopt import LOPT_PAPER, LoPT
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.trainers.checks import check_dataset, check_model
from lopt_hf.trainers.configs import LoPTDPOConfig, local_config
from lopt_hf.trainers.engines import asked_engine
from lopt_hf.trainers.mixin import LocalLearningMixin
from lopt_hf.trainers.reference import check_synchronised_reference, match_reference

__all__ = ["LoPTDPOTrainer", "LocalDPOTrainer"]

LAYOUTS = ({"prompt", "chosen", "rejected"}, {"chosen", "rejected"}, {"prompt_ids", "chosen_ids", "rejected_ids"})


class LocalDPOTrainer(LocalLearningMixin, DPOTrainer):
    """Trainer for DPO by any method of local learning.

    The preference loss trains the last block; early blocks learn as the method says, on the chosen and the rejected
    answers alike, which share one forward. Reference forwards are the stock model's.

    Args:
        model: Model id, local folder, or a `transformers` causal language model, PEFT-wrapped or not.
        ref_model: The reference model. Default: the model as it was at the start; with a new adapter the model
            without it, with one that `model` has already a copy of that.
        args: Training arguments that mix in a method's (`LocalTrainingArguments`).
        *dpo_args: The remaining positional arguments of `DPOTrainer`.
        method: The method. Default: the one that the arguments are of.
        **dpo_kwargs: The keyword arguments of `DPOTrainer`.
    """

    _tag_names = ["trl", "dpo", "local-learning"]
    _name = "Local DPO"

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: Any = None,
        *dpo_args: Any,
        method: Method | None = None,
        **dpo_kwargs: Any,
    ) -> None:
        parameters = inspect.signature(DPOTrainer.__init__)
        given = parameters.bind_partial(self, model, ref_model, args, *dpo_args, **dpo_kwargs).arguments
        check_model(model, args, given.get("peft_config"), given.get("quantization_config"))
        check_dataset(given.get("train_dataset"), LAYOUTS)
        check_synchronised_reference(args.sync_ref_model, asked_engine(args))
        super().__init__(model, ref_model, args, *dpo_args, method=method, **dpo_kwargs)
        if args.sync_ref_model:
            match_reference(self.learner.base_model, self.accelerator.unwrap_model(self.ref_model))


class LoPTDPOTrainer(LocalDPOTrainer):
    """Trainer for DPO with LoPT's gradient boundary (https://huggingface.co/papers/2605.04913).

    The preference loss trains the last block, or as many of the last blocks as `task_reach` says. Earlier blocks learn
    to keep their input reconstructible from their output (`local_objective`), on the chosen and the rejected answers
    alike, which share one forward, or stand still. Reference forwards are the stock model's.

    The only change with respect to [`~trl.DPOTrainer`] is what local learning adds; every argument of the parent is
    accepted and means the same, and the saved model is a stock checkpoint. The paper does not report DPO.

    Args:
        model: Model id, local folder, or a `transformers` causal language model, PEFT-wrapped or not.
        ref_model: The reference model. Default: the model as it was at the start; with a new adapter the model
            without it, with one that `model` has already a copy of that.
        args: Training arguments. Default: `LoPTDPOConfig` with the output folder `<model>-LoPT-DPO`.
        *dpo_args: The remaining positional arguments of `DPOTrainer`.
        local_objective: The early blocks' objective. Default: the one that `args.local_objective` names.
        **dpo_kwargs: The keyword arguments of `DPOTrainer`.

    Example:

    ```python
    from datasets import load_dataset
    from lopt_hf import LoPTDPOConfig, LoPTDPOTrainer

    trainer = LoPTDPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=LoPTDPOConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _tag_names = ["trl", "dpo", "lopt", "local-learning"]
    _name = "LoPT-DPO"
    _paper = LOPT_PAPER

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *dpo_args: Any,
        local_objective: LocalObjective | None = None,
        **dpo_kwargs: Any,
    ) -> None:
        args = local_config(model, args, LoPTDPOConfig, "LoPT-DPO")
        method = None if local_objective is None else LoPT(local_objective)
        super().__init__(model, ref_model, args, *dpo_args, method=method, **dpo_kwargs)
