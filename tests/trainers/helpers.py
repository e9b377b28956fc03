"""Short training runs for the trainer tests."""

from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from lopt_hf import LoPTConfig, LoPTTrainer
from tests.tiny import make_dataset, make_model, make_tokenizer


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


def make_trainer(
    output_dir: Path, model: Any = None, trainer_kwargs: dict | None = None, **overrides: Any
) -> LoPTTrainer:
    kwargs = {"train_dataset": make_dataset(), "processing_class": make_tokenizer(), **(trainer_kwargs or {})}
    return LoPTTrainer(model or make_model(), LoPTConfig(**training_args(output_dir, **overrides)), **kwargs)


def make_sft_trainer(output_dir: Path, model: Any = None, **overrides: Any) -> SFTTrainer:
    return SFTTrainer(
        model=model or make_model(),
        args=SFTConfig(**training_args(output_dir, **overrides)),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
    )


def snapshot(trainer: LoPTTrainer) -> dict[str, torch.Tensor]:
    """Copies of all trainable weights, heads included."""
    heads = {f"head.{n}": p for n, p in trainer.local_heads.named_parameters()}
    model = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {name: parameter.detach().clone() for name, parameter in {**model, **heads}.items()}


def one_step_gradients(trainer: LoPTTrainer, which: str | int = "both") -> dict[str, torch.Tensor | None]:
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
