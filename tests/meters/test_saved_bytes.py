"""`SavedBytes` against graphs whose saved tensors can be counted by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lopt_hf.meters.saved_bytes import SavedBytes

FLOAT = 4  # bytes of a float32


def test_chain_saves_each_output_once():
    """tanh saves its output: three of them keep three tensors of 6 floats, and not the input of the first."""
    x = torch.randn(2, 3, requires_grad=True)
    with SavedBytes() as saved:
        y = x.tanh().tanh().tanh()
        assert saved.current == 3 * 6 * FLOAT
        y.sum().backward()
    assert saved.current == 0
    assert saved.peak == 3 * 6 * FLOAT


def test_backward_releases_as_it_goes():
    """Half of a chain is freed when the gradient has passed it."""
    x = torch.randn(4, requires_grad=True)
    seen = []
    with SavedBytes() as saved:
        middle = x.tanh().tanh()
        middle.register_hook(lambda grad: seen.append(saved.current))
        middle.tanh().tanh().sum().backward()
    # a tensor hook runs before the node that made the tensor: the two outputs of the first half are still saved
    assert seen == [2 * 4 * FLOAT]
    assert saved.current == 0


def test_linear_saves_its_input_and_not_its_weight():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    with SavedBytes(model) as saved:
        y = model(x)
        # the input of the first linear; tanh's output, which is the input of the second as well
        assert saved.current == (5 * 8 + 5 * 16) * FLOAT
        y.sum().backward()
    assert saved.current == 0
    with SavedBytes() as everything:
        y = model(x)
    # the first linear needs no weight for the gradient, as its input needs none
    assert everything.current == (5 * 8 + 5 * 16 + 16 * 4) * FLOAT
    del y
    assert everything.current == 0


def test_excludes_an_iterable_of_tensors_and_buffers():
    scale = torch.randn(7)
    x = torch.randn(7, requires_grad=True)
    with SavedBytes([scale]) as saved:
        assert (x * scale).sum().requires_grad
    assert saved.peak == 0

    model = nn.Module()
    model.register_buffer("scale", scale)
    with SavedBytes(model) as saved:
        assert (x * scale.view(7)).sum().requires_grad
    assert saved.peak == 0


def test_a_training_step_leaves_out_what_is_stepped():
    """Also what is not the model's: the weight of a head behind it."""
    model, head = nn.Linear(8, 8), nn.Linear(8, 4)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": head.parameters()}])
    x = torch.randn(5, 8)
    with SavedBytes.of_training(model, optimizer) as saved:
        head(model(x)).sum().backward()
    assert saved.peak == 2 * 5 * 8 * FLOAT  # the inputs of both


def test_shared_storage_counts_once_and_in_full():
    """Views keep all of their storage; a tensor that two nodes saved is freed with the second."""
    base = torch.randn(10, 10)
    x = torch.randn(10, requires_grad=True)
    with SavedBytes([x]) as saved:
        first, second = x * base[0], x * base[3]
        assert saved.current == 100 * FLOAT
        del first
        assert saved.current == 100 * FLOAT
        del second
        assert saved.current == 0
        y = x + 1
        square, inverse = y * y, y.cos()  # y is saved three times
        assert saved.current == 10 * FLOAT
        del square
        assert saved.current == 10 * FLOAT
        del inverse
    assert saved.current == 0


def test_dropped_graph_is_released_after_the_context():
    x = torch.randn(3, requires_grad=True)
    with SavedBytes() as saved:
        y = x.exp()
    assert saved.current == 3 * FLOAT
    z = x.exp()  # not watched any more
    assert saved.current == 3 * FLOAT
    (y + z).sum().backward()
    assert saved.current == 0


def test_reset_peak():
    x = torch.randn(3, requires_grad=True)
    with SavedBytes() as saved:
        x.exp().exp().sum().backward()
        assert saved.peak == 6 * FLOAT
        saved.reset_peak()
        assert saved.peak == 0
        x.exp().sum().backward()
        assert saved.peak == 3 * FLOAT


def test_gradients_are_unchanged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with SavedBytes(model):
        model(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_autocast_copies_of_weights_count():
    model = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    with SavedBytes([*model.parameters()]) as saved, torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert saved.peak == (4 * 8 + 8 * 8) * 2  # input and weight, both as bf16 copies
    y.sum().backward()
    assert saved.current == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_keeps_the_input_only(use_reentrant):
    x = torch.randn(6, requires_grad=True)

    def chain(h):
        return h.exp().exp().exp()

    with SavedBytes() as saved:
        y = checkpoint(chain, x, use_reentrant=use_reentrant)
        assert saved.current == 6 * FLOAT
        y.sum().backward()
    assert saved.current == 0
    # the documented limit: only the reentrant form shows what it recomputes
    assert saved.peak == (4 if use_reentrant else 1) * 6 * FLOAT
