"""Short MLAAN runs, and losses written out by hand to compare them with."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lopt_hf import MLAANConfig, MLAANTrainer
from tests.tiny import make_dataset, make_model, make_tokenizer
from tests.trainers.helpers import training_args


def make_mlaan_trainer(
    output_dir: Path, model: Any = None, trainer_kwargs: dict | None = None, **overrides: Any
) -> MLAANTrainer:
    kwargs = {"train_dataset": make_dataset(), "processing_class": make_tokenizer(), **(trainer_kwargs or {})}
    settings = {"calibration_tokens": 64, **overrides}
    return MLAANTrainer(model or make_model(), MLAANConfig(**training_args(output_dir, **settings)), **kwargs)


def first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients_of(trainer: Any, inputs: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor | None]:
    """The gradients of one micro-batch, without the optimizer's step; heads by `head.<name>`."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, inputs or first_batch(trainer)).backward()
    if isinstance(trainer, MLAANTrainer):
        trainer.learner.after_backward()
        heads = {f"head.{n}": p.grad for n, p in trainer.local_heads.named_parameters()}
        return {**{n: p.grad for n, p in trainer.model.named_parameters()}, **heads}
    return {n: p.grad for n, p in trainer.model.named_parameters()}


def next_token_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100)
