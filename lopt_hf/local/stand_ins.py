"""What stands in a model for a part of it that is somewhere else.

Shapes: B batch, T tokens, D hidden channels.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

__all__ = ["PixelsAsHidden"]


class PixelsAsHidden(nn.Module):
    """In place of an image classifier's embeddings: hands on what the model is given as pixels.

    Args:
        dtype: The data type that the model is to keep it in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # ViT casts its pixels to the type of this weight.
        self.patch_embeddings = SimpleNamespace(projection=SimpleNamespace(weight=torch.empty(0, dtype=dtype)))

    def forward(self, h_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return h_BTD
