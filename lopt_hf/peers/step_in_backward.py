"""The optimizer's step in the backward: a gradient is used and freed as soon as it is complete."""

from functools import partial

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from lopt_hf.local.run_facts import steps_in_backward
from lopt_hf.local.stepping import stepping_only
from lopt_hf.peers.base import Peer

__all__ = ["StepInBackward"]


class StepInBackward(Peer):
    """Steps each parameter within the backward, so that the gradients of all are never there together.

    The idea is LOMO's (arXiv 2306.09782, Sec. 3.1), for any optimizer; torch's tutorial on saving memory "by fusing
    the optimizer step into the backward pass" has it with one optimizer for each parameter. Here there is one as ever,
    called with one gradient at a time: schedulers and checkpoints are what they are without. `grad_norm` in the log is
    0, as no gradient is left to be measured.
    """

    name = "e2e_step_in_backward"
    takes_adapters = True

    def __init__(self) -> None:
        self._parameters: list[torch.nn.Parameter] = []
        self._handles: list[RemovableHandle] = []

    def check(self, args: TrainingArguments) -> None:
        super().check(args)
        if args.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} clips the norm of all gradients together, and with "
                f"{self.name} they are never there together; set it to 0."
            )
        if args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} keeps gradients from one backward to "
                f"the next, and {self.name} keeps none; set it to 1 and raise per_device_train_batch_size."
            )
        if args.fp16:
            raise ValueError(
                f"fp16=True scales the loss and looks at all gradients before a step, which {self.name} does not wait "
                "for; use bf16."
            )
        optim = OptimizerNames(args.optim).value
        if steps_in_backward(optim):
            raise ValueError(f"optim={optim!r} steps in the backward by itself; leave out method={self.name}.")

    def prepare(self, model: PreTrainedModel) -> None:
        self._parameters = list(model.parameters())

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        step = partial(self._step, optimizer)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(step)
            for parameter in self._parameters
            if parameter.requires_grad
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _step(self, optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
        with stepping_only(optimizer, [parameter]):  # type: ignore[list-item]  # a hook is typed for tensors
            optimizer.step()
        parameter.grad = None
