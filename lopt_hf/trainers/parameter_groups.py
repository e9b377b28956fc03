"""What local learning changes of an optimizer's parameter groups and of their schedules."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lopt_hf.local.embeddings import is_untied
from lopt_hf.local.learner import LocalLearner
from lopt_hf.local.stepping import end_schedules_at, set_learning_rate

__all__ = ["add_missing_parameters", "end_with_reach", "set_learning_rates"]


def add_missing_parameters(optimizer: Optimizer, learner: LocalLearner) -> None:
    """Adds what an optimizer of the user's own does not know: the heads, and the LM head that was untied since.

    They join groups that are there, as a scheduler may know the groups; the LM head that of the embeddings.
    """
    groups: list[list[nn.Parameter]] = [group["params"] for group in optimizer.param_groups]
    present = {id(parameter) for group in groups for parameter in group}
    groups[0].extend(p for p in learner.heads.parameters() if p.requires_grad and id(p) not in present)
    model: Any = learner.base_model
    if not is_untied(model):
        return
    weight, copy = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if id(copy) not in present:
        for group in groups:
            if any(parameter is weight for parameter in group):
                group.append(copy)


def set_learning_rates(optimizer: Optimizer, learner: LocalLearner, args: Any) -> None:
    """Gives blocks the rates that `early_learning_rate` or `reach_rate` say, where they are not the run's."""
    rates = learner.learning_rates(optimizer.param_groups[0]["lr"])  # of `optimizer_cls_and_kwargs` too
    early = list(zip(learner.parameters_to_learn()[:-1], rates[:-1], strict=True))
    if args.reach_anneal:  # a group for each block, as the schedules of their rates end apart
        for block, rate in early:
            set_learning_rate(optimizer, block, rate)
        return
    for rate in dict.fromkeys(rates[:-1]):
        if rate != rates[-1] or args.early_learning_rate is not None:
            set_learning_rate(optimizer, [p for block, own in early if own == rate for p in block], rate)


def end_with_reach(scheduler: LRScheduler, learner: LocalLearner, num_training_steps: int) -> None:
    """Lets each block's part of a scheduler end with the last step in which the task's gradient reaches the block."""
    ends = [
        (block, learner.schedule.end(index, num_training_steps))
        for index, block in enumerate(learner.parameters_to_learn())
    ]
    end_schedules_at(scheduler, ends, num_training_steps)
