"""States of parameters that no step has seen, as FSDP2's checkpoints need them."""

import copy

import pytest
import torch
from torch import nn

from lopt_hf.trainers.checkpoint import complete_states

STARTS_AT_ZERO = {
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
}


def stepped(optimizer: torch.optim.Optimizer, *learning: nn.Parameter) -> None:
    """Steps some parameters, with gradients that follow from their values."""
    for parameter in learning:
        parameter.grad = parameter.detach() ** 2 + 1
    optimizer.step()
    optimizer.zero_grad()


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(6.0).reshape(2, 3)), nn.Parameter(torch.arange(4.0))]


@pytest.mark.parametrize("name", STARTS_AT_ZERO)
def test_a_run_goes_on_with_them_as_it_would_without(name):
    make, options = STARTS_AT_ZERO[name]
    whole, resumed = parameters(), parameters()
    optimizer = make(whole, lr=0.1, **options)
    stepped(optimizer, whole[1])
    with complete_states(optimizer) as missing:
        state = copy.deepcopy(optimizer.state_dict())
    assert missing == 0
    assert state["state"].keys() == {0, 1}
    assert whole[0] not in optimizer.state
    with torch.no_grad():
        resumed[1].copy_(whole[1])
    other = make(resumed, lr=0.1, **options)
    other.load_state_dict(state)
    for _ in range(3):
        stepped(optimizer, *whole)
        stepped(other, *resumed)
    assert all(map(torch.equal, whole, resumed))


def test_what_begins_otherwise_is_counted():
    weights = parameters()
    optimizer = torch.optim.NAdam(weights)
    stepped(optimizer, weights[1])
    with complete_states(optimizer) as missing:
        assert weights[0] not in optimizer.state
    assert missing == 1


def test_an_optimizer_without_states_has_none_afterwards():
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1)
    stepped(optimizer, weights[1])
    with complete_states(optimizer) as missing:
        assert not any(optimizer.state.values())
    assert missing == 0
