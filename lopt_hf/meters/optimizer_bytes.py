"""How many bytes of state an optimizer holds."""

import torch

from lopt_hf.common.upstream.torch import tree_iter

__all__ = ["state_bytes"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of the tensors in an optimizer's state; a storage that several share counts once."""
    tensors = (leaf for leaf in tree_iter(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())
