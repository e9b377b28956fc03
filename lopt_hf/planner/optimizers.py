"""The optimizers whose memory a plan knows, by their names in `TrainingArguments.optim`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from transformers import Adafactor

__all__ = ["DEFAULT_OPTIMIZER", "OPTIMIZERS", "make_optimizer"]

DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers 5
# bitsandbytes, optim/optimizer.py: blocks of one scale each, and what is too small to quantise
_BLOCK = 256
_SMALLEST_QUANTISED = 4096


class _EightBitAdam(Optimizer):
    """The state that bitsandbytes' 8-bit Adam and AdamW keep; it needs a GPU, so only its memory is imitated.

    Args:
        parameters: What it trains.
        in_fp32: Those of them whose state stays in fp32: `Trainer` says so of embeddings.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], in_fp32: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self._in_fp32 = {id(parameter) for parameter in in_fp32}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and not self.state[parameter]:
                self._make_state(parameter)

    def _make_state(self, parameter: nn.Parameter) -> None:
        size = parameter.numel()
        quantised = size >= _SMALLEST_QUANTISED and id(parameter) not in self._in_fp32
        for number in ("1", "2"):
            state_type = torch.uint8 if quantised else torch.float32
            self.state[parameter][f"state{number}"] = torch.zeros(parameter.shape, dtype=state_type)
            if quantised:
                self.state[parameter][f"absmax{number}"] = torch.zeros(-(-size // _BLOCK))


def _eight_bit(parameters: Sequence[nn.Parameter], model: nn.Module) -> Optimizer:
    embeddings = [p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()]
    return _EightBitAdam(parameters, embeddings)


_Maker = Callable[[Sequence[nn.Parameter], nn.Module], Optimizer]
OPTIMIZERS: dict[str, _Maker] = {
    "adamw_torch_fused": lambda parameters, model: AdamW(parameters, fused=True),
    "adamw_torch": lambda parameters, model: AdamW(parameters, foreach=True),  # torch's default on a GPU
    "adamw_8bit": _eight_bit,
    "adamw_bnb_8bit": _eight_bit,
    "sgd": lambda parameters, model: SGD(parameters, foreach=True),
    "adagrad": lambda parameters, model: Adagrad(parameters, foreach=True),
    "adafactor": lambda parameters, model: Adafactor(
        parameters, lr=1e-5, scale_parameter=False, relative_step=False
    ),  # as `Trainer` makes it
}


def make_optimizer(name: str, parameters: Sequence[nn.Parameter], model: nn.Module) -> Optimizer:
    """Makes an optimizer.

    Args:
        name: One of `OPTIMIZERS`.
        parameters: What it trains.
        model: Where they are from.
    """
    return OPTIMIZERS[name](parameters, model)
