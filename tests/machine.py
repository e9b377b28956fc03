"""A machine of a given speed, in place of the one that the tests run on."""

import inspect

import pytest
import torch

from lopt_hf.common import arithmetic


def set_machine(monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool) -> None:
    """Lets a CPU be the only device, on which bfloat16 is twice as fast as float32, or 30 times slower."""
    seconds = {"float32": 2e-3, "bfloat16": 1e-3 if has_bfloat16 else 6e-2}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(arithmetic, "_seconds_per_product", lambda: seconds)
    for name in ("_measure_cpu", "_warn_of_slow_bfloat16"):  # without what they keep of the real one
        monkeypatch.setattr(arithmetic, name, inspect.unwrap(getattr(arithmetic, name)))
