"""The translator: one linear map from the hidden states where a gap begins to those where it ends.

Shapes: B batch, T tokens, D hidden channels.
"""

import torch
from torch import nn

from lopt_hf.common.ridge import LinearRidge

__all__ = ["RELATIVE_RIDGE", "Translator", "TranslatorFit"]

RELATIVE_RIDGE = 1e-2  # ours: on SmolLM2-135M 1e-3 gives the same local loss within 0.01 nats, 1e-1 0.1 more


class Translator(nn.Linear):
    """A linear map (B, T, D) -> (B, T, D) in fp32 that starts as the identity and is calibrated before training."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size, dtype=torch.float32)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        return super().forward(h_BTD.float()).to(h_BTD.dtype)


class TranslatorFit:
    """Fits a translator in closed form, drawn towards the identity; its sums don't grow with the number of tokens.

    The first position of a sequence has activations hundreds of times larger than the others (an attention sink).
    It is fitted like every other, since the leapt layers attend to it; but it is left out of the mean square that the
    penalty is relative to, which it would raise to where nothing else is fitted.

    Args:
        hidden_size: Width D.
        device: Where the sums are.
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self._sums = LinearRidge(hidden_size, RELATIVE_RIDGE, device)

    def add(self, h_ND: torch.Tensor, target_ND: torch.Tensor, is_first_N: torch.Tensor) -> None:
        """Adds tokens: hidden states before and after the gap, and which of them begin a sequence."""
        self._sums.add(h_ND[~is_first_N], target_ND[~is_first_N])
        self._sums.add(h_ND[is_first_N], target_ND[is_first_N], in_penalty=False)

    def solve(self, translator: Translator) -> None:
        """Puts the fitted map into a translator."""
        identity_FD = torch.eye(*self._sums.right_FD.shape)
        map_FD = self._sums.solve(identity_FD)
        translator.weight.data.copy_(map_FD[:-1].T)
        translator.bias.data.copy_(map_FD[-1])
