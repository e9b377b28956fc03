import pytest
import torch

from lopt_hf.local.blocks import split_layers
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.objectives import LocalBatch, ReconstructionHead, ReconstructionObjective, head_of


def test_head_is_the_papers():
    head = ReconstructionHead(16, bottleneck=4)
    norm, down, _, up = head
    assert down.weight.shape == (4, 16) and up.weight.shape == (16, 4)
    assert not down.bias.any() and not up.bias.any()
    bound = 0.1 * (6 / (16 + 4)) ** 0.5  # Xavier uniform at gain 0.1
    assert down.weight.abs().max() <= bound and down.weight.abs().max() > 0.8 * bound
    h = torch.randn(2, 3, 16)
    by_hand = torch.nn.functional.gelu(norm(h) @ down.weight.T) @ up.weight.T
    torch.testing.assert_close(head(h), by_hand)


def test_loss_is_the_mean_over_unmasked_tokens():
    target, output = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    error = (output - target).square().mean(-1)
    objective = ReconstructionObjective(masked=True)
    loss = objective(torch.nn.Identity(), output, target, LocalBatch(mask_BT=mask))
    assert loss == pytest.approx((error[0, 0] + error[0, 1] + error[1, 0]).item() / 3)
    unmasked = ReconstructionObjective(masked=False)(torch.nn.Identity(), output, target, LocalBatch(mask_BT=mask))
    assert unmasked == pytest.approx(error.mean().item())


def test_heads_leave_the_global_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    blocks = split_layers(6, 3)
    heads = LocalHeads.make(ReconstructionObjective(), 8, blocks, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert not torch.equal(heads["0"][1].weight, heads["1"][1].weight)


def test_a_head_does_not_depend_on_which_others_are_kept():
    blocks = split_layers(6, 3)
    heads = LocalHeads.make(ReconstructionObjective(), 8, blocks, seed=1)
    alone = LocalHeads.make(ReconstructionObjective(), 8, blocks, seed=1, only=[blocks[1]])
    assert list(alone) == ["1"]
    assert torch.equal(alone["1"][1].weight, heads["1"][1].weight)


def test_the_protocols_example_runs():
    """The docstring's example is a complete local objective."""
    import inspect
    import re

    from lopt_hf import LocalObjective

    # Not `__doc__`, which Python 3.13 no longer indents.
    code = re.search(r"```python\n(.*?)```", inspect.getdoc(LocalObjective), re.DOTALL).group(1)
    namespace: dict = {}
    exec(code, namespace)
    objective = namespace["StayClose"]()
    head = head_of(objective, 4)
    assert not list(head.parameters())
    assert objective(head, torch.ones(1, 1, 4), torch.zeros(1, 1, 4), LocalBatch()) == 1.0
