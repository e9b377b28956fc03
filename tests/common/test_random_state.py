"""Random states, on devices too that this machine has not."""

import pytest
import torch

from lopt_hf.common.random_state import RandomState


class Device:
    """A device's module, with a state for each number; that of MPS takes none."""

    def __init__(self, has_one: bool) -> None:
        self.has_one = has_one
        self.states = {0: torch.tensor([0]), 1: torch.tensor([10])}

    def get_rng_state(self, *number: int) -> torch.Tensor:
        return self.states[self._one(number)].clone()

    def set_rng_state(self, state: torch.Tensor, *number: int) -> None:
        self.states[self._one(number)] = state.clone()

    def _one(self, number: tuple[int, ...]) -> int:
        assert len(number) == (0 if self.has_one else 1)
        return number[0] if number else 0


@pytest.mark.parametrize(
    ("name", "number"), [("cpu", None), ("cuda:1", 1), ("xpu:0", 0), ("mps", 0), ("mps:0", 0), ("meta", None)]
)
def test_states_of_the_device_are_restored(monkeypatch: pytest.MonkeyPatch, name: str, number: int | None) -> None:
    device, module = torch.device(name), Device(has_one=name.startswith("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda asked: {device.type: module}[asked])
    first = RandomState.of([device, torch.device("cpu")])
    drawn = torch.rand(2)
    if number is not None:
        module.states[number] += 5  # what drawing on the device does
    later = {key: value.clone() for key, value in module.states.items()}
    state = torch.get_rng_state()
    with first.restored():
        assert torch.equal(torch.rand(2), drawn)
        assert number is None or module.states[number] == later[number] - 5
    assert torch.equal(torch.get_rng_state(), state) and module.states == later
    assert first.devices == ([] if number is None else [number])
    with pytest.raises(RuntimeError), first.restored():
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)


def test_states_of_an_older_checkpoint_are_of_cuda_devices() -> None:
    assert RandomState(torch.get_rng_state(), [], []).device_type == "cuda"
