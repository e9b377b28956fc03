"""Short training runs for the trainer tests, of every kind of trainer."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lopt_hf import (
    LoPTConfig,
    LoPTDPOConfig,
    LoPTDPOTrainer,
    LoPTGRPOConfig,
    LoPTGRPOTrainer,
    LoPTTrainer,
)
from tests.tiny import VOCABULARY, make_dataset, make_model, make_pairs, make_questions, make_tokenizer


def token_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Differs between almost any two completions, so that every group has something to learn from."""
    return [sum(map(ord, str(completion))) % 97 / 97 for completion in completions]


@dataclass(frozen=True)
class Kind:
    """A trainer of ours beside TRL's own, with what a short run of it needs."""

    trainer: type
    config: type
    stock_trainer: type
    stock_config: type
    make_data: Callable[..., Dataset]
    settings: dict[str, Any]
    trainer_kwargs: dict[str, Any]


KINDS = {
    "sft": Kind(LoPTTrainer, LoPTConfig, SFTTrainer, SFTConfig, make_dataset, {}, {}),
    "dpo": Kind(LoPTDPOTrainer, LoPTDPOConfig, DPOTrainer, DPOConfig, make_pairs, {}, {}),
    "grpo": Kind(
        LoPTGRPOTrainer,
        LoPTGRPOConfig,
        GRPOTrainer,
        GRPOConfig,
        make_questions,
        {"max_completion_length": 8, "num_generations": 2},
        {"reward_funcs": token_reward},
    ),
}


def training_args(output_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Arguments of a short, quiet fp32 run on the CPU."""
    return {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **overrides,
    }


def kind_kwargs(kind: str, model: Any, trainer_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments of a trainer of this kind, but for model and config."""
    given = trainer_kwargs or {}
    kwargs = {"train_dataset": KINDS[kind].make_data(), "processing_class": make_tokenizer()}
    if kind == "dpo" and "peft_config" not in given and not isinstance(model, str):
        kwargs["ref_model"] = copy.deepcopy(model)  # which TRL would look for on the hub
    return {**kwargs, **KINDS[kind].trainer_kwargs, **given}


def make_trainer(
    output_dir: Path,
    model: Any = None,
    trainer_kwargs: dict | None = None,
    kind: str = "sft",
    trainer_class: type | None = None,
    **overrides: Any,
) -> Any:
    """A trainer of ours of this kind, or of a class made from it."""
    model = model or make_model()
    args = KINDS[kind].config(**training_args(output_dir, **{**KINDS[kind].settings, **overrides}))
    trainer_class = trainer_class or KINDS[kind].trainer
    return trainer_class(model=model, args=args, **kind_kwargs(kind, model, trainer_kwargs))


def make_stock_trainer(output_dir: Path, model: Any = None, kind: str = "sft", **overrides: Any) -> Any:
    """TRL's own trainer of this kind."""
    model = model or make_model()
    args = KINDS[kind].stock_config(**training_args(output_dir, **{**KINDS[kind].settings, **overrides}))
    return KINDS[kind].stock_trainer(model=model, args=args, **kind_kwargs(kind, model, None))


class WithFixedCompletions(LoPTGRPOTrainer):
    """GRPO whose completions follow from prompt and place in the group, however many processes share them."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        first = self.accelerator.process_index * len(prompt_ids)
        return [self._complete(ids, (first + i) % self.num_generations) for i, ids in enumerate(prompt_ids)], None

    def _complete(self, prompt_ids: list[int], place: int) -> list[int]:
        rng = random.Random(f"{prompt_ids} {place}")
        return [rng.randrange(3, len(VOCABULARY)) for _ in range(self.max_completion_length)]


class InTwoForwards(WithFixedCompletions):
    """Computes the log-probabilities of a micro-batch in two forwards with gradients."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, *args: Any, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        half = input_ids.size(0) // 2
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, batch_size=half, **kwargs)


def snapshot(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all trainable weights, heads included."""
    heads = {f"head.{n}": p for n, p in trainer.local_heads.named_parameters()}
    model = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {name: parameter.detach().clone() for name, parameter in {**model, **heads}.items()}


def one_step_gradients(trainer: Any, which: str | int = "both") -> dict[str, torch.Tensor | None]:
    """The gradients of one micro-batch, without the optimizer's step.

    Args:
        which: `"both"`; or, with the joint local backward, only those of the `"task"` loss or of the local loss of
            the block with this index.
    """
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.local_heads.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, inputs)
    if which == "task":
        loss = loss - trainer.boundary.joint_loss()
    elif which != "both":
        loss = trainer.boundary._joint_losses[which]
    loss.backward()
    heads = {f"head.{n}": p.grad for n, p in trainer.local_heads.named_parameters()}
    return {**{n: p.grad for n, p in trainer.model.named_parameters()}, **heads}
