"""Whatever an optimizer keeps goes on from a checkpoint, or is refused before there is one."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lopt_hf.pipeline.runtime.optimizer_state import check_optimizer_state, load_optimizer_state, save_optimizer_state
from lopt_hf.scripts import pipeline
from tests.distributed.pipeline_fault_worker import become_rank
from tests.distributed.pipeline_processes import Processes, arguments, checkpoints, write_inputs

X_ND = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class TableSGD(torch.optim.SGD):
    """As bitsandbytes' optimizers do, it keeps a table with each parameter's state that is one for all of them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.table = torch.linspace(-1, 1, 16)

    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] |= {"table": self.table, "part": self.table[4:8], "number": 3}
        return loss


def make(optimizer_class=TableSGD, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    return model, optimizer_class(model.parameters(), lr=0.1, momentum=0.9, **settings)


def train(model, optimizer, num_steps):
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(X_ND).square().sum().backward()
        optimizer.step()


def test_tensors_that_parameters_share_go_on(tmp_path):
    whole, optimizer = make()
    train(whole, optimizer, 2)
    save_optimizer_state(optimizer, dict(whole.named_parameters()), tmp_path)
    resumed, other = make()
    resumed.load_state_dict(whole.state_dict())
    load_optimizer_state(other, dict(resumed.named_parameters()), [tmp_path])
    for expected, found in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert expected.keys() == found.keys() >= {"momentum_buffer", "table", "part"}
        assert found.pop("number") == 3
        assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    train(whole, optimizer, 2), train(resumed, other, 2)
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))


class Quantised(torch.Tensor):
    """In place of torchao's."""


@pytest.mark.parametrize(("value", "kind"), [(object(), "object"), (torch.zeros(2).as_subclass(Quantised), "Quant")])
def test_what_no_file_could_hold_is_named(value, kind):
    model, optimizer = make(torch.optim.SGD)
    train(model, optimizer, 1)
    check_optimizer_state(optimizer)
    optimizer.state[model[0].bias]["own"] = value
    with pytest.raises(ValueError, match=f"optim=SGD keeps 'own' of type {kind}.*, or set save_strategy to 'no'"):
        check_optimizer_state(optimizer)
    optimizer.state.clear()
    optimizer.param_groups[0]["own"] = value
    with pytest.raises(ValueError, match=f"optim=SGD keeps 'own' of type {kind}"):
        check_optimizer_state(optimizer)


def run_rank(rank, environment, log, command, _):
    """A stage whose optimizer keeps an object, as GaLore's do."""
    become_rank(rank, environment, log)

    def keep(optimizer, *_):
        for values in optimizer.state.values():
            values["projector"] = object()

    register_optimizer_step_post_hook(keep)
    pipeline.main(command)


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_finds_it_at_its_first_step(tmp_path, saves):
    write_inputs(tmp_path)
    strategy = "steps" if saves else "no"
    command = arguments(
        tmp_path, tmp_path / "out", num_blocks=2, gradient="delayed", max_steps=4, save_steps=4, save_strategy=strategy
    )
    processes = Processes([command] * 2, tmp_path / "logs", target=run_rank)
    codes = processes.wait(120)
    outputs = [processes.output(rank) for rank in range(2)]
    assert codes == ([1, 1] if saves else [0, 0]), outputs
    for output in outputs if saves else []:
        assert "rank 1 (stage 1) failed: optim=AdamW keeps 'projector' of type object, which a pip" in output
        assert "'loss'" not in output, "it has gone on"
    assert not checkpoints(tmp_path / "out")
