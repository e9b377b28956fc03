"""Which bytes a step keeps alive at its peak, and what it computes: a meter over every operation.

It works on fake tensors, which have shapes but no data, and on real ones.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from lopt_hf.common.upstream.torch import TorchDispatchMode, storage_key, tree_iter

__all__ = ["CATEGORIES", "MemoryMeter", "Work"]

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "logits", "communication")
_aten = torch.ops.aten
_ASKS_FOR_THE_DEVICE = torch.ops.prim.device.default  # two of three calls with fake tensors; nothing to count
# torch's registry has the attention kernels of GPUs only. As there: all pairs of tokens count, though a causal kernel
# skips half of them. Each of the two products of the forward, and of the five of the backward, has 2 S T D per head.
_FLASH_PRODUCTS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}


@dataclass(frozen=True)
class Work:
    """What the operations of a span computed.

    Attributes:
        flops: Floating-point operations of matrix products and attention, a multiply-add counted as two.
        moved_bytes: Bytes that all other operations read and wrote.
    """

    flops: int = 0
    moved_bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved_bytes + other.moved_bytes)

    def __mul__(self, times: int) -> "Work":
        return Work(self.flops * times, self.moved_bytes * times)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.flops - other.flops, self.moved_bytes - other.moved_bytes)


class MemoryMeter(TorchDispatchMode):
    """Follows every storage from its first use to its end, by what it is for.

    A storage counts once and in full, however many tensors share it. What is created belongs to the category of the
    innermost `region`, `"activations"` outside of one: what autograd keeps, and temporaries. Parameters, gradients
    and communication buffers are told to the meter.

    Attributes:
        current: Bytes alive, by category.
        peak: The same at the moment when most bytes were alive, since `reset_peak()`.
        gradient_peak: The most bytes of gradients alone, whenever that was, since `reset_peak()`.
        work: What was computed since `reset_peak()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = dict.fromkeys(CATEGORIES, 0)
        self.peak = dict(self.current)
        self.gradient_peak = 0
        self.work = Work()
        self._total = self._peak_total = 0
        self._region = "activations"
        self._category: dict[int, str] = {}
        self._ends: dict[int, Any] = {}

    def reset_peak(self) -> None:
        """Starts a new peak at what is alive now, and counts work anew."""
        self.gradient_peak = self.current["gradients"]
        self.peak, self._peak_total, self.work = dict(self.current), self._total, Work()

    @contextlib.contextmanager
    def region(self, category: str) -> Iterator[None]:
        """What is created in this block belongs to `category`."""
        before, self._region = self._region, category
        try:
            yield
        finally:
            self._region = before

    def count(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Says what tensors are for, whether they are known already or not."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage_key(storage), storage.nbytes()
            if key not in self._category:
                self._add(storage, category)
            else:
                self.current[self._category[key]] -= size
                self.current[category] += size
                self._category[key] = category

    def follow_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Counts each parameter's gradient as one as soon as it has it."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._count_gradient)

    def _count_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.count([parameter.grad], "gradients")
        self.gradient_peak = max(self.gradient_peak, self.current["gradients"])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _ASKS_FOR_THE_DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        is_new = False
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage_key(storage) not in self._category:
                    self._add(storage, self._region)
                    is_new = True
        if is_new or func._schema.is_mutable:
            self._count_work(func, args, kwargs, output)
        return output

    def count_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Counts the arithmetic of a matrix product (of shapes (N, K) and (K, M))."""
        self.work += Work(flops=2 * left.numel() * right.shape[-1])

    def _add(self, storage: torch.UntypedStorage, category: str) -> None:
        key, size = storage_key(storage), storage.nbytes()
        self._category[key] = category
        self._ends[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self.current[category] += size
        self._total += size
        if self._total > self._peak_total:
            self._peak_total, self.peak = self._total, dict(self.current)

    def _remove(self, key: int, size: int) -> None:
        del self._ends[key]
        self.current[self._category.pop(key)] -= size
        self._total -= size

    def _count_work(self, func: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        packet = func.overloadpacket
        if packet in flop_registry:
            self.work += Work(flops=flop_registry[packet](*args, **kwargs, out_val=output))
        elif packet is _aten.addmm_:
            self.count_product(*args[1:3])
        elif packet is _aten._grouped_mm:  # each token's product with its expert's matrix, or the matrices' gradients
            self.count_product(*args[:2])
        elif packet in _FLASH_PRODUCTS:
            position, products = _FLASH_PRODUCTS[packet]
            query, key = args[position : position + 2]
            self.work += Work(flops=products * 2 * query.numel() * key.shape[-2])
        else:
            tensors = (t for t in tree_iter((args, kwargs, output)) if isinstance(t, torch.Tensor))
            size = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
            self.work += Work(moved_bytes=size)
