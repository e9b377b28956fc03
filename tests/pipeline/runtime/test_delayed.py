"""What a stage learns from a gradient that comes late, beside autograd on the whole stock model."""

import contextlib
import copy
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lopt_hf.common.random_state import RandomState
from lopt_hf.local.blocks import split_layers
from lopt_hf.local.boundary import GradientBoundary
from lopt_hf.local.objectives import NoObjective
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.pipeline.runtime.channel import BatchId
from lopt_hf.pipeline.runtime.delayed import DelayedGradients
from lopt_hf.pipeline.runtime.stage import load_stage
from lopt_hf.pipeline.runtime.stage_checkpoint import load_in_flight
from lopt_hf.pipeline.runtime.stage_forward import StageForward
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.pipeline.runtime.weight_prediction import WeightPrediction
from lopt_hf.pipeline.runtime.weight_versions import WeightVersion, weights_put_back
from tests.tiny import make_model

INPUTS = [{"input_ids": torch.arange(3, 27).reshape(2, 12) + 7 * step} for step in range(3)]
for given in INPUTS:
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][0, 9:] = 0
COTANGENTS = torch.randn(3, 2, 12, 32, generator=torch.Generator().manual_seed(0))
COEFFICIENT, SCALE = 0.01, 0.5


class Channel:
    """In place of one to another process."""

    def __init__(self, messages):
        self.messages = deque(messages)

    def get(self, batch):
        return self.messages.popleft()


def make_stage(folder, recompute=True, delay=1, cotangents=COTANGENTS, prediction=None, timeline=None):
    plan = plan_stages(blocks := split_layers(4, 2), 2)[0]
    model = load_stage(str(folder), plan, dtype=torch.float32).train()
    stack, sent = find_decoder_stack(model), []
    forward = StageForward(model, stack, plan, sent.append)
    boundary = GradientBoundary(model, blocks, NoObjective(), nn.ModuleDict(), 1.0, "eager", COEFFICIENT, blocks[:1])
    stage = DelayedGradients(
        model,
        forward,
        boundary,
        delay=delay,
        recompute=recompute,
        prediction=prediction,
        receiver=Channel(cotangents),
        sender=None,
        autocast=contextlib.nullcontext,
        timeline=timeline or Timeline(0),
        check_finite=lambda name, value: None,
    )
    return model, stage, sent


def run_step(stage, step):
    arguments = {**INPUTS[step], "output_router_logits": True}
    stage.begin(BatchId(step, 0, 0), arguments, None, SCALE)
    stage.run_forward()
    stage.run_backward(True)


def expected_gradients(stock, step):
    """Of the cotangent, and of the routers of the first two layers of four."""
    outputs = stock.model(**INPUTS[step], output_router_logits=True, output_hidden_states=True, use_cache=False)
    loss = (outputs.hidden_states[2] * COTANGENTS[step]).sum()
    balance = load_balancing_loss_func(outputs.router_logits[:2], 4, 2, INPUTS[step]["attention_mask"])
    stock.zero_grad()
    (loss + SCALE * COEFFICIENT * 2 / 4 * balance).backward()
    return {name: parameter.grad.clone() for name, parameter in stock.named_parameters() if parameter.grad is not None}


def change(model):
    """As an optimizer does, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_of_a_mixture_of_experts(tmp_path, recompute):
    """Run again they are those of the new weights; with a kept graph of the weights of the forward."""
    stock = make_model("mixtral")
    stock.save_pretrained(tmp_path)
    model, stage, sent = make_stage(tmp_path, recompute=recompute)
    run_step(stage, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    if not recompute:
        expected = expected_gradients(stock, 0)
    change(model), change(stock)
    if recompute:
        expected = expected_gradients(stock, 0)
    run_step(stage, 1)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and any("gate" in name for name in gradients)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert len(sent) == 2, "a replayed output was sent again"
    with torch.no_grad():
        hidden_BTD = stock.model(**INPUTS[1], output_hidden_states=True, use_cache=False).hidden_states[2]
    torch.testing.assert_close(sent[1], hidden_BTD)


def test_what_waits(tmp_path):
    """By default token ids and the random state; with graphs also activations, and weights of each step."""
    make_model("mixtral").save_pretrained(tmp_path)
    kept = {}
    for recompute in (True, False):
        model, stage, _ = make_stage(tmp_path, recompute=recompute)
        for step in range(3):
            run_step(stage, step)
            kept.setdefault(recompute, set()).add(stage.kept_bytes)
    batch = 2 * 2 * 12 * 8 + torch.get_rng_state().nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert kept[True] == {batch}
    assert len(kept[False]) <= 3 and all(weights + batch < each < 40 * weights for each in kept[False])


def move(model, optimizer, directions):
    """A step of the optimizer by gradients that are the same at every step: the rate times their signs."""
    for name, parameter in model.named_parameters():
        parameter.grad = directions[name].clone()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("recompute", [True, False])
def test_a_forward_sees_the_weights_that_its_gradient_will(tmp_path, recompute):
    """Where gradients stay as they are, so that Adam's moments say it whole; at the rates of the steps to come."""
    stock = make_model("mixtral")
    stock.save_pretrained(tmp_path)
    rates = [0.01, 0.03, 0.02, 0.04]
    directions = {name: torch.randn_like(parameter) for name, parameter in stock.named_parameters()}
    start = {name: parameter.detach().clone() for name, parameter in stock.named_parameters()}
    begun = []
    prediction = WeightPrediction(lambda: optimizer, lambda ahead: [rates[begun[-1] + ahead]])
    model, stage, sent = make_stage(tmp_path, recompute, delay=2, prediction=prediction)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)

    def put_stock(distance):
        with torch.no_grad():
            for name, parameter in stock.named_parameters():
                parameter.copy_(start[name] - distance * directions[name].sign())

    for step in range(3):
        begun.append(step)
        now = copy.deepcopy(model.state_dict())
        run_step(stage, step)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.param_groups[0]["lr"] = rates[step]
        move(model, optimizer, directions)
    # Nothing is known before the first step. At the second one the first's gradient is to come, in the third; at the
    # third one that of the second too, in the fourth.
    for step, moves in enumerate([[], [0, 2], [0, 1, 2, 3]]):
        put_stock(sum(rates[move] for move in moves))
        with torch.no_grad():
            hidden_BTD = stock.model(**INPUTS[step], output_hidden_states=True, use_cache=False).hidden_states[2]
        torch.testing.assert_close(sent[step], hidden_BTD, rtol=1e-4, atol=1e-5)
    put_stock(0)
    if recompute:
        stock.load_state_dict(now, strict=False)
    for name, gradient in expected_gradients(stock, 0).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_optimizer_without_moments_is_named(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    prediction = WeightPrediction(lambda: optimizer, lambda ahead: [0.1])
    model, stage, _ = make_stage(tmp_path, delay=2, prediction=prediction)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run_step(stage, 0)
    move(model, optimizer, dict(model.named_parameters()))
    with pytest.raises(ValueError, match="weight_prediction=True needs Adam's moments, which SGD does not keep"):
        run_step(stage, 1)


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_in_flight_goes_on_from_a_checkpoint(tmp_path, recompute):
    """Two steps late, and with dropout."""
    make_model("mixtral", attention_dropout=0.3).save_pretrained(tmp_path)

    def gradients(resumes):
        torch.manual_seed(0)
        model, stage, sent = make_stage(tmp_path, recompute, delay=2)
        for step in range(2):
            run_step(stage, step)
            change(model)
        if resumes:
            torch.save([model.state_dict(), stage.state()], tmp_path / "in-flight.pt")
            weights, state = torch.load(tmp_path / "in-flight.pt", weights_only=True)
            random_state = torch.get_rng_state()
            model, stage, sent = make_stage(tmp_path, recompute, 2, COTANGENTS[1:])
            model.load_state_dict(weights)
            stage.load_state(state)
            torch.set_rng_state(random_state)
        run_step(stage, 2)
        for _ in stage.drain():
            pass
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return gradients | {"handed on": sent[-1]}

    first, second = gradients(False), gradients(True)
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_in_flight_goes_where_the_model_is(tmp_path):
    """But for random states, which torch takes from the CPU alone, also those of other devices."""
    make_model("mixtral").save_pretrained(tmp_path)
    model, stage, _ = make_stage(tmp_path, delay=2)
    for step in range(2):
        stage.begin(BatchId(step, 0, 0), INPUTS[step], torch.zeros(2, 12, 32))
        stage.run_backward(True)
    plan = plan_stages(split_layers(4, 2), 2)[0]
    (tmp_path / "in-flight").mkdir()
    torch.save(stage.state(), tmp_path / f"in-flight/{plan.name}-0.pt")
    model.to("meta")
    args = SimpleNamespace(device=torch.device("meta"))
    trainer = SimpleNamespace(delayed=stage, plan=plan, world=SimpleNamespace(replica=0), args=args)
    load_in_flight(trainer, SimpleNamespace(folder=tmp_path))
    state = stage.state()
    kept = [kept for step in state["steps"] for kept in step]
    assert len(kept) == 2 and len(state["cotangents"]) == 1
    moved = [*state["cotangents"], *(tensor for each in kept for tensor in each["arguments"].values())]
    assert {tensor.device.type for tensor in [*moved, *(each["hidden_BTD"] for each in kept)]} == {"meta"}
    for each in kept:
        with RandomState(**each["random_state"]).restored():
            pass


def test_a_forward_that_runs_again_has_the_dropout_of_the_first(tmp_path):
    make_model("mixtral", attention_dropout=0.3).save_pretrained(tmp_path)
    found = []
    for recompute in (True, False):
        torch.manual_seed(0)
        model, stage, sent = make_stage(tmp_path, recompute=recompute)
        run_step(stage, 0), run_step(stage, 1)
        found.append([*sent, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert len(found[0]) == len(found[1]) > 2
    assert all(torch.equal(again, kept) for again, kept in zip(*found, strict=True))


def test_what_comes_late_is_in_the_timeline_as_its_own_micro_batchs(tmp_path):
    """Not as that of the micro-batch under way, in whose time it runs; and those of the last steps kept are there."""
    make_model("mixtral").save_pretrained(tmp_path)
    timeline = Timeline(0, kept_steps=2)
    model, stage, _ = make_stage(tmp_path, timeline=timeline)
    for step in range(3):
        timeline.step, timeline.micro_batch = step, step + 10  # counted over the run, not in the step
        run_step(stage, step)
    found = [(event.kind, event.step, event.microbatch) for event in timeline.events]
    assert found == [("receive", 0, 10), ("backward", 0, 10), ("receive", 1, 11), ("backward", 1, 11)]


def test_weights_are_put_back():
    model = nn.Linear(3, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    version = WeightVersion(model)
    change(model)
    now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with weights_put_back(model) as put:
        put(version.weights)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, now[name]) for name, tensor in model.state_dict().items())
    assert version.weight_bytes == 12 * 4
