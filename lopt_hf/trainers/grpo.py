"""Local learning on TRL's GRPO trainer."""

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from lopt_hf.common.upstream.grpo import GRPOTrainer
from lopt_hf.local.methods.base import Method
from lopt_hf.local.methods.lopt import LOPT_PAPER, LoPT
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.trainers.checks import check_dataset, check_model, check_questions, check_rewards, load_config
from lopt_hf.trainers.configs import LoPTGRPOConfig, local_config
from lopt_hf.trainers.engines import asked_engine
from lopt_hf.trainers.mixin import LocalLearningMixin
from lopt_hf.trainers.reference import check_synchronised_reference, match_reference

__all__ = ["LoPTGRPOTrainer", "LocalGRPOTrainer", "TruncationWarning"]

logger = logging.getLogger(__name__)

LAYOUTS = ({"prompt"},)


class TruncationWarning(TrainerCallback):
    """Says once that a run learns nothing, since all completions are cut off and what is cut off is left out.

    Args:
        max_completion_length: Where they are cut off, in tokens.
    """

    def __init__(self, max_completion_length: int | None) -> None:
        self.max_completion_length = max_completion_length
        self._has_said = False

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Looks at the share of completions that were cut off since the last log."""
        all_cut_off = (logs or {}).get("completions/clipped_ratio") == 1.0
        if args.mask_truncated_completions and all_cut_off and not self._has_said and state.is_world_process_zero:
            self._has_said = True
            logger.warning(
                "max_completion_length=%s cut off every completion since the last log, at step %d, and "
                "mask_truncated_completions=True leaves out what is cut off: nothing was learned from these. Raise "
                "max_completion_length, or set mask_truncated_completions to False.",
                self.max_completion_length,
                state.global_step,
            )


class LocalGRPOTrainer(LocalLearningMixin, GRPOTrainer):
    """Trainer for GRPO by any method of local learning.

    The clipped policy loss trains the last block; early blocks learn as the method says, on prompts and sampled
    completions. Generation, old log-probabilities and reference forwards are the stock model's, and a checkpoint holds
    completions that are still to be trained on.

    Args:
        model: Model id, local folder, or a `transformers` causal language model, PEFT-wrapped or not.
        reward_funcs: Reward functions or models, as `GRPOTrainer` takes them; `lopt_hf.rewards` has two.
        args: Training arguments that mix in a method's (`LocalTrainingArguments`).
        *grpo_args: The remaining positional arguments of `GRPOTrainer`.
        method: The method. Default: the one that the arguments are of.
        **grpo_kwargs: The keyword arguments of `GRPOTrainer`.
    """

    _tag_names = ["trl", "grpo", "local-learning"]
    _name = "Local GRPO"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: Any = None,
        *grpo_args: Any,
        method: Method | None = None,
        **grpo_kwargs: Any,
    ) -> None:
        parameters = inspect.signature(GRPOTrainer.__init__)
        given = parameters.bind_partial(self, model, reward_funcs, args, *grpo_args, **grpo_kwargs).arguments
        check_model(model, args, given.get("peft_config"), given.get("quantization_config"))
        check_dataset(given.get("train_dataset"), LAYOUTS)
        check_questions(given.get("train_dataset"), args)
        check_rewards(reward_funcs, given.get("train_dataset"))
        _check_vllm(model, args, given.get("peft_config"))
        check_synchronised_reference(args.sync_ref_model, asked_engine(args))
        super().__init__(model, reward_funcs, args, *grpo_args, method=method, **grpo_kwargs)
        self.add_callback(TruncationWarning(args.max_completion_length))
        if args.sync_ref_model:
            match_reference(self.learner.base_model, self.accelerator.unwrap_model(self.ref_model))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM is sent every parameter of the model before it generates, and knows none of the heads.
        with self.learner.heads.hidden(self.learner.base_model):
            return super()._generate_single_turn(*args, **kwargs)

    # ---- Checkpoints: the parent forgets what it has generated and not yet trained on ----

    def _save_local_state(self, staged: Path, final: Path) -> None:
        super()._save_local_state(staged, final)
        state = {
            "step": self._step,
            "num_processes": self.accelerator.num_processes,
            "steps_per_generation": self.args.steps_per_generation,
            "inputs": self._buffered_inputs if self._step % self._steps_per_batch() else None,
        }
        staged.mkdir(parents=True, exist_ok=True)  # on a host whose disk the first process does not see
        torch.save(state, staged / self._generation_file())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, self._generation_file())
        state = torch.load(path, map_location=self.args.device, weights_only=True) if path.is_file() else {}
        now = (self.accelerator.num_processes, self.args.steps_per_generation)  # into so many parts a batch is cut
        if (state.get("num_processes"), state.get("steps_per_generation")) == now:  # else anew, as the parent
            self._step, self._buffered_inputs = state["step"], state["inputs"]

    def _steps_per_batch(self) -> int:
        """Forward and backward passes from one generation to the next."""
        return self.args.steps_per_generation * self.num_iterations

    def _generation_file(self) -> str:
        return f"generation_{self.accelerator.process_index}.pt"


class LoPTGRPOTrainer(LocalGRPOTrainer):
    """Trainer for GRPO with LoPT's gradient boundary (https://huggingface.co/papers/2605.04913).

    The clipped policy loss trains the last block, or as many of the last blocks as `task_reach` says. Earlier blocks
    learn to keep their input (prompts and sampled completions) reconstructible from their output (`local_objective`),
    or stand still. Generation, old log-probabilities and reference forwards are the stock model's.

    What changes with respect to [`~trl.GRPOTrainer`] is what local learning adds, and that a checkpoint holds
    completions that are still to be trained on; every argument of the parent is accepted and means the same, and the
    saved model is a stock checkpoint.

    Args:
        model: Model id, local folder, or a `transformers` causal language model, PEFT-wrapped or not.
        reward_funcs: Reward functions or models, as `GRPOTrainer` takes them; `lopt_hf.rewards` has two.
        args: Training arguments. Default: `LoPTGRPOConfig` with the output folder `<model>-LoPT-GRPO`.
        *grpo_args: The remaining positional arguments of `GRPOTrainer`.
        local_objective: The early blocks' objective. Default: the one that `args.local_objective` names.
        **grpo_kwargs: The keyword arguments of `GRPOTrainer`.

    Example:

    ```python
    from datasets import load_dataset
    from lopt_hf import LoPTGRPOConfig, LoPTGRPOTrainer
    from lopt_hf.rewards import gsm8k_reward

    trainer = LoPTGRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=gsm8k_reward,
        args=LoPTGRPOConfig(output_dir="out"),
        train_dataset=load_dataset("openai/gsm8k", "main", split="train").rename_column("question", "prompt"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _tag_names = ["trl", "grpo", "lopt", "local-learning"]
    _name = "LoPT-GRPO"
    _paper = LOPT_PAPER

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: TrainingArguments | None = None,
        *grpo_args: Any,
        local_objective: LocalObjective | None = None,
        **grpo_kwargs: Any,
    ) -> None:
        args = local_config(model, args, LoPTGRPOConfig, "LoPT-GRPO")
        method = None if local_objective is None else LoPT(local_objective)
        super().__init__(model, reward_funcs, args, *grpo_args, method=method, **grpo_kwargs)


def _check_vllm(model: str | PreTrainedModel, args: LoPTGRPOConfig, peft_config: Any) -> None:
    """Raises if vLLM would sample from another model than the one that learns."""
    if not args.use_vllm or args.tied_embeddings == "freeze" or peft_config or isinstance(model, PeftModel):
        return
    config: Any = model.config if isinstance(model, PreTrainedModel) else load_config(model, args)
    if config.get_text_config(decoder=True).tie_word_embeddings:
        raise ValueError(
            "use_vllm=True with tied_embeddings='untie': the model's embedding and LM head are one weight, of which "
            "vLLM keeps one copy and drops what the LM head has learned; set tied_embeddings to 'freeze'."
        )
