"""What the package takes from the inside of torch."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lopt_hf.common.upstream.guard import Upstream

__all__ = [
    "BatchNorm",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensorMode",
    "TorchDispatchMode",
    "clear_forward_hooks",
    "forward_pre_hooks",
    "ignored_by_ddp",
    "remove_forward_hooks",
    "remove_forward_pre_hooks",
    "storage_key",
    "tree_iter",
    "version_of",
    "without_forward_hooks",
    "without_modes",
]

TORCH = Upstream("torch", "2.11", "2.15")

with TORCH.names():
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from torch.utils._pytree import tree_iter

    _product: Any = torch.ops.aten.mm.default

TORCH.check(DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model")
TORCH.check(
    nn.Module(),
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
TORCH.check(torch.Tensor, "_version")
TORCH.check(torch.UntypedStorage, "_cdata")
TORCH.check(_product, "_schema")
TORCH.check(
    torch.ops.aten,
    "_grouped_mm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def storage_key(storage: torch.UntypedStorage) -> int:
    """A storage's identity as long as it lives; unlike its data's address, a fake tensor's has one too."""
    return storage._cdata


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor has been written into."""
    return tensor._version


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run before a module's forward."""
    return list(module._forward_pre_hooks.values())


def remove_forward_pre_hooks(module: nn.Module, kind: type) -> None:
    """Takes away the hooks of one class that run before a module's forward."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, kind)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def remove_forward_hooks(module: nn.Module, kind: type) -> None:
    """Takes away the hooks of one class that run behind a module's forward."""
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, kind)]:
        del module._forward_hooks[key]


def clear_forward_hooks(module: nn.Module) -> None:
    """Takes away all hooks that run before and after a module's forward, its children's aside."""
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()


@contextmanager
def without_forward_hooks(module: nn.Module) -> Iterator[None]:
    """Lets no hook of a module run in this block, its children's aside."""
    hooks = module._forward_pre_hooks, module._forward_hooks
    module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = hooks


@contextmanager
def without_modes() -> Iterator[None]:
    """Lets no mode that follows operations (fake tensors, meters) see those of this block."""
    with _disable_current_modes():
        yield


@contextmanager
def ignored_by_ddp(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Lets DDP, when it wraps `model` in this block, leave the parameters with these names alone.

    The marks are taken off again, so that whoever wraps the model next has all of it synchronised.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    try:
        yield
    finally:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ())
        for name in names:
            model.get_parameter(name)._ddp_ignored = False  # type: ignore[attr-defined]
