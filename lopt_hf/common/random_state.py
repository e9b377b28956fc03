"""The random state of the CPU and of devices, which a second run of a part of the model begins in."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["RandomState"]


@dataclass(frozen=True)
class RandomState:
    """The random state of the CPU and of some devices of one type.

    Not torch's own helpers: they take no MPS device, and what sets states takes all others for CUDA ones.

    Attributes:
        cpu: That of the CPU.
        devices: Ids of the devices.
        states: Those of the devices, in their order.
        device_type: The type of the devices.
    """

    cpu: torch.Tensor
    devices: list[int]
    states: list[torch.Tensor]
    device_type: str = "cuda"  # of checkpoints that do not name it

    @classmethod
    def now(cls, tensor: torch.Tensor) -> "RandomState":
        """Returns the present state of the CPU and of a tensor's device."""
        return cls.of([tensor.device])

    @classmethod
    def of(cls, devices: Iterable[torch.device]) -> "RandomState":
        """Returns the present state of the CPU and of some devices; those without one of their own do not count."""
        others = [device for device in devices if device.type not in ("cpu", "meta")]
        if not others:
            return cls(torch.get_rng_state(), [], [])
        device_type, numbers = others[0].type, sorted({device.index or 0 for device in others})
        return cls(torch.get_rng_state(), numbers, [_state_of(device_type, number) for number in numbers], device_type)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Makes a context that begins in this state, and behind which everything goes on as if it had not been."""
        before = RandomState.of([torch.device(self.device_type, number) for number in self.devices])
        self.set()
        try:
            yield
        finally:
            before.set()

    def set(self) -> None:
        """Makes this the present state."""
        torch.set_rng_state(self.cpu)
        for number, state in zip(self.devices, self.states, strict=True):
            module = torch.get_device_module(self.device_type)
            module.set_rng_state(state, *_place(self.device_type, number))


def _state_of(device_type: str, number: int) -> torch.Tensor:
    state: torch.Tensor = torch.get_device_module(device_type).get_rng_state(*_place(device_type, number))
    return state


def _place(device_type: str, number: int) -> tuple[int, ...]:
    """What a device's own functions are told of where it is: there is one MPS device, and they take no number."""
    return () if device_type == "mps" else (number,)
