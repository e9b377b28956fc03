"""The counter against gradients whose sizes are known."""

import torch
from torch import nn

from lopt_hf.meters.gradient_bytes import GradientBytes

FLOAT = 4  # bytes of a float32


def test_peak_is_that_of_all_gradients_that_are_there_together():
    first, second = nn.Linear(3, 5, bias=False), nn.Linear(7, 2)
    frozen = nn.Parameter(torch.zeros(100), requires_grad=False)
    with GradientBytes([*first.parameters(), *second.parameters(), frozen]) as gradients:
        first(torch.ones(1, 3)).sum().backward()
        assert gradients.current == 15 * FLOAT
        first.zero_grad()
        assert gradients.current == 0
        second(torch.ones(1, 7)).sum().backward()
        second(torch.ones(1, 7)).sum().backward()  # accumulates
        second.zero_grad()
    assert gradients.peak == 16 * FLOAT
    first(torch.ones(1, 3)).sum().backward()
    second(torch.ones(1, 7)).sum().backward()
    assert gradients.peak == 16 * FLOAT  # does not look any more


def test_a_gradient_that_a_hook_frees_at_once_counts():
    layer = nn.Linear(3, 5)
    with GradientBytes(layer.parameters()) as gradients:
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        layer(torch.ones(1, 3)).sum().backward()
    assert gradients.current == 0
    assert gradients.peak == 15 * FLOAT


def test_gradients_from_before_count():
    layer = nn.Linear(4, 4, bias=False)
    layer(torch.ones(1, 4)).sum().backward()
    with GradientBytes(layer.parameters()) as gradients:
        pass
    assert gradients.peak == 16 * FLOAT


def test_views_of_one_storage_count_once():
    buffer = torch.zeros(10)
    halves = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    for half, gradient in zip(halves, buffer.split(5), strict=True):
        half.grad = gradient
    assert GradientBytes(halves).current == 10 * FLOAT
