"""The meter beside torch's own memory tracker and FLOP counter."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lopt_hf.planner.memory import MemoryMeter


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def train(model, optimizer, steps=2):
    for _ in range(steps):
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def make():
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), foreach=False, fused=True)


def test_peak_equals_that_of_torchs_tracker():
    with FakeTensorMode():
        model, optimizer = make()
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            train(model, optimizer, steps=1)
        expected = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    with FakeTensorMode():
        model, optimizer = make()
        meter = MemoryMeter()
        meter.count(model.parameters(), "parameters")
        with meter:
            train(model, optimizer, steps=1)
    assert sum(meter.peak.values()) == expected


def test_flops_equal_those_of_torchs_counter():
    with FakeTensorMode():
        model, optimizer = make()
        counter = FlopCounterMode(display=False)
        with counter:
            train(model, optimizer)
        meter = MemoryMeter()
        with meter:
            train(model, optimizer)
    assert meter.work.flops == counter.get_total_flops() > 0


def test_attention_counts_as_torch_counts_that_of_gpus():
    """Two products in the forward and five in the backward, of 2 x batch x heads x tokens x tokens x width each."""
    q, k, v = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    meter = MemoryMeter()
    with meter:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert meter.work.flops == 7 * 2 * 2 * 4 * 16 * 16 * 8


def test_flops_of_experts():
    """Eight tokens, each with a matrix of 16 x 32: forward, gradient of the tokens, gradient of the matrices."""
    with FakeTensorMode():
        tokens = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
        experts = torch.randn(4, 16, 32, dtype=torch.bfloat16, requires_grad=True)
        meter = MemoryMeter()
        with meter:
            torch._grouped_mm(tokens, experts, offs=torch.arange(2, 9, 2, dtype=torch.int32)).square().sum().backward()
    assert meter.work.flops == 3 * 2 * 8 * 16 * 32


def test_categories_of_a_step():
    model, optimizer = make()
    size = sum(parameter.nbytes for parameter in model.parameters())
    meter = MemoryMeter()
    meter.count(model.parameters(), "parameters")
    meter.follow_gradients(model.parameters())
    with meter:
        model(torch.randn(32, 64)).square().mean().backward()
        assert meter.current["parameters"] == meter.current["gradients"] == size
        with meter.region("optimizer"):
            optimizer.step()
        optimizer.zero_grad()
    assert meter.current["gradients"] == 0
    steps = 4 * len(list(model.parameters()))
    assert meter.current["optimizer"] == 2 * size + steps
    assert sum(meter.peak.values()) >= 4 * size


def test_storage_counts_once_however_many_views_it_has():
    meter = MemoryMeter()
    with meter:
        x = torch.zeros(100)
        y = x[:10].view(2, 5)
        assert meter.current["activations"] == 400
        del x
        assert meter.current["activations"] == 400
        del y
    assert meter.current["activations"] == 0
    assert meter.peak["activations"] == 400


@pytest.mark.parametrize("in_place", [False, True])
def test_moved_bytes_of_an_elementwise_operation(in_place):
    x, y = torch.ones(100), torch.ones(100)
    meter = MemoryMeter()
    meter.count([x, y], "activations")
    with meter:
        _ = x.add_(y) if in_place else x + y
        x.view(10, 10).t()
    assert meter.work.moved_bytes == 1200


def test_peak_starts_anew():
    meter = MemoryMeter()
    with meter:
        x = torch.zeros(100)
        del x
        meter.reset_peak()
        _ = torch.zeros(10)
    assert sum(meter.peak.values()) == 40
