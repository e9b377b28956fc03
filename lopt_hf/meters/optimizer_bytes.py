"""What an optimizer steps, and how many bytes of state it holds."""

import torch
from torch import nn

from lopt_hf.common.upstream.torch import tree_iter

__all__ = ["state_bytes", "stepped_weights"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of the tensors in an optimizer's state; a storage that several share counts once."""
    tensors = (leaf for leaf in tree_iter(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())


def stepped_weights(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns the weights of all of an optimizer's groups."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]
