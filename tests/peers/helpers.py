"""Short runs of TRL's trainer with a peer's callback, and what is seen of their steps."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.tiny import make_dataset, make_model, make_tokenizer
from tests.trainers.helpers import training_args


def make_trainer(
    output_dir: Path,
    *callbacks: TrainerCallback,
    model: Any = None,
    data: Any = None,
    peft: Any = None,
    **overrides: Any,
) -> SFTTrainer:
    return SFTTrainer(
        model or make_model(),
        SFTConfig(**training_args(output_dir, **overrides)),
        train_dataset=data or make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=peft,
        callbacks=list(callbacks),
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_equal(first: torch.nn.Module, second: torch.nn.Module) -> None:
    assert changed(weights(first), weights(second)) == set()


class Steps(TrainerCallback):
    """For each step by names: what had a gradient, what has changed, and how many steps Adam's state is old."""

    def __init__(self) -> None:
        self.with_gradient: list[set[str]] = []
        self.changed: list[set[str]] = []
        self.adam_steps: list[dict[str, int]] = []

    def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = weights(model)

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.with_gradient.append({name for name, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, *args: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        self.changed.append(changed(self.before, weights(model)))
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        self.adam_steps.append({named[id(p)]: int(state["step"]) for p, state in optimizer.state.items() if state})
