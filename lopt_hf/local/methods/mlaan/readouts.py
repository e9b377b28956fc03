"""Norm and LM head of the local losses: frozen, moving behind the model's, or trainable for each block.

Shapes: B batch, T tokens, N tokens that count in the loss, D hidden channels, V vocabulary.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lopt_hf.local.objectives import LocalBatch
from lopt_hf.local.readout import (
    Readout,
    ReadoutObjective,
    TokenLoss,
    frozen_copy,
    model_after_the_layers,
    tokens_at_once,
    unadapted,
)

__all__ = ["MovingReadoutObjective", "TrainableReadoutObjective"]


class MovingReadoutObjective(ReadoutObjective):
    """Next-token loss through an exponential moving average of the model's norm and LM head.

    Args:
        model: The model, with the weights that the run starts from.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._pairs: list[tuple[nn.Module, nn.Module]] = []

        def take(live: nn.Module, empty: nn.Module) -> nn.Module:
            average = frozen_copy(live, empty, copy=True)
            self._pairs.append((average, unadapted(live)))
            return average

        readout = Readout(model_after_the_layers(model, take))
        super().__init__(readout, tokens_at_once(model))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Moves the average towards the model's weights: `e <- decay * e + (1 - decay) * theta`."""
        for average, live in self._pairs:
            if average is not live:  # frozen weights are shared
                for moving, parameter in zip(average.parameters(), live.parameters(), strict=True):
                    moving.lerp_(parameter.to(moving), 1 - decay)


class TrainableReadoutObjective:
    """Next-token loss through the `readout` of a block's head, which trains with it.

    Logits are computed again in the backward, chunk by chunk.

    Args:
        tokens_per_chunk: Tokens whose logits exist at once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._make = functools.partial(_trainable_readout, model)
        self.tokens_per_chunk = tokens_at_once(model)
        self.token_loss = TokenLoss()

    def make_head(self, hidden_size: int) -> nn.Module:
        """A trainable copy of the model's norm and LM head, as it is at this moment."""
        return self._make()

    def __call__(
        self, head: Any, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: LocalBatch
    ) -> torch.Tensor:
        hidden_ND, labels_N = self.token_loss.counted(output_BTD, batch)
        total = hidden_ND.sum() * 0.0
        for hidden, labels in self.token_loss.chunks(self.tokens_per_chunk, hidden_ND, labels_N):
            total = total + checkpoint(_cross_entropy, head.readout, hidden, labels, use_reentrant=False)
        return total / max(1, labels_N.numel())


def _cross_entropy(readout: nn.Module, hidden_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(readout(hidden_ND[None])[0].float(), labels_N, reduction="sum")


def _trainable_readout(model: PreTrainedModel) -> nn.Module:
    def take(live: nn.Module, empty: nn.Module) -> nn.Module:
        empty.load_state_dict(
            {name: value.clone() for name, value in unadapted(live).state_dict().items()}, assign=True
        )
        return empty.requires_grad_(True)

    return Readout(model_after_the_layers(model, take))
