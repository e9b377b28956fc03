"""The steps at the end of a run, from the gradients that were still on their way."""

from typing import Any

from lopt_hf.pipeline.runtime.delayed import DelayedGradients

__all__ = ["drain"]


def drain(trainer: Any, delayed: DelayedGradients) -> None:
    """Learns from what has not come when the last step is over, each step's gradient in a step of its own.

    Args:
        trainer: The stage's trainer.
        delayed: What it has kept.
    """
    scheduler = trainer.lr_scheduler.state_dict()
    trainer.model.zero_grad()
    trainer.local_heads.zero_grad()  # which have been in the step that has just ended
    for _ in delayed.drain():
        norm = trainer._clip_grad_norm(trainer.model) if trainer.args.max_grad_norm > 0 else None
        trainer._get_grad_norm(trainer.model, norm)
        trainer.optimizer.step()
        trainer.learner.after_step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
    # What is saved counts the run's own steps.
    trainer.lr_scheduler.load_state_dict(scheduler)
    for group, rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
