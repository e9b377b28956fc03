"""Image classifiers whose early stage learns from the task's gradient of the step before, beside one process.

The one process is as plain as can be: a whole model of two blocks, and what waits between two steps.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import set_seed

from lopt_hf.local.layer_calls import hidden_of, with_hidden
from lopt_hf.local.stacks import find_stack
from lopt_hf.trainers.image import ImageTrainer, ImageTrainingArguments
from tests.distributed.test_pipeline_image import assert_equal, load_model, run_pipeline
from tests.image.helpers import make_images, make_model, options

CUT = 3
STEPS = 5
DELAYED: dict[str, Any] = {
    "gradient": "delayed",
    "num_blocks": 2,
    "max_steps": STEPS,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "weight_prediction": True,
    "late_warmup_steps": 0,
    "weight_decay": 0.1,
}
CYCLE = [2, 2, 1]  # of steps 0, 1, 3 and 4 the gradient comes to the first stage, a step late
KEPT = {"gradient_recompute": False, "max_steps": 1}
SAVES = {"save_strategy": "steps", "save_steps": 2}
RUNS: dict[str, dict[str, Any]] = {
    name: {"family": family, **DELAYED, **settings}
    for family in ("vit", "resnet")
    for name, settings in {
        family: SAVES,
        f"{family}, resumed": {**SAVES, "resume": f"{family}/checkpoint-2"},
        f"{family}, one step": {"max_steps": 1},
        f"{family}, one step, kept": KEPT,
        f"{family}, both": {"gradient": "local_and_delayed", "weight_prediction": False},
        f"{family}, reach": {**SAVES, "task_reach": CYCLE},
        f"{family}, reach, resumed": {**SAVES, "task_reach": CYCLE, "resume": f"{family}, reach/checkpoint-2"},
    }.items()
}


class DelayedTrainer(ImageTrainer):
    """Stock training of the last block; the first one learns from the cotangent of a step before that reaches it."""

    def begin(self, cycle: list[int]) -> None:
        self.cycle = cycle
        self.layers = find_stack(self.model).layers
        self.waiting: tuple[dict[str, Any], torch.Tensor] | None = None
        self.is_late = False
        early = {id(parameter) for layer in self.layers[:CUT] for parameter in layer.parameters()}
        self.early = [p for name, p in self.model.named_parameters() if id(p) in early or "embed" in name]
        self.layers[CUT].register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.is_late:
            return None
        self.leaf = hidden_of(args, kwargs).detach().requires_grad_()
        return with_hidden(args, kwargs, self.leaf)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        reaches = self.cycle[self.state.global_step % len(self.cycle)] == 2
        now = [parameter.data for parameter in self.early]
        if reaches and self.waiting is not None:
            for parameter in self.early:
                parameter.data = self.expected(parameter)  # as the step's gradient will find them
        loss = super().training_step(model, inputs, *args, **kwargs)
        for parameter, weight in zip(self.early, now, strict=True):
            parameter.data = weight
        self.learn()
        assert self.leaf.grad is not None
        self.waiting = (inputs, self.leaf.grad) if reaches else None
        return loss

    def expected(self, parameter: nn.Parameter) -> torch.Tensor:
        """A step on, by Adam's moments of now."""
        state = self.optimizer.state.get(parameter)
        if not state:
            return parameter.data
        mean, square = state["exp_avg"] / (1 - 0.9 ** state["step"].item()), state["exp_avg_sq"]
        root = (square / (1 - 0.999 ** state["step"].item())).sqrt()
        return parameter.data - self.args.learning_rate * (mean / (root + self.args.adam_epsilon))

    def learn(self) -> None:
        if self.waiting is None:
            return
        (inputs, cotangent), self.waiting = self.waiting, None
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        outputs: list[torch.Tensor] = []
        handle = self.layers[CUT - 1].register_forward_hook(lambda layer, args, output: outputs.append(output))
        self.is_late = True
        self.model.base_model(pixel_values=inputs["pixel_values"])
        self.is_late = False
        handle.remove()
        outputs[0].backward(cotangent)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def finish(self) -> None:
        self.model.zero_grad()
        self.learn()
        self.optimizer.step()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("stages")
    run_pipeline(folder, 2, RUNS)
    return folder


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("name, cycle", [("", [2]), (", reach", CYCLE)], ids=["always", "reach"])
def test_weights_equal_those_of_one_process_with_the_same_delay(finished, tmp_path, family, name, cycle):
    own = {name: DELAYED[name] for name in ("max_steps", "max_grad_norm", "lr_scheduler_type", "weight_decay")}
    set_seed(42)
    args = ImageTrainingArguments(**options(tmp_path / "one", **own))
    trainer = DelayedTrainer(make_model(family), args, train_dataset=make_images(24))
    trainer.begin(cycle)
    trainer.train()
    trainer.finish()
    trainer.save_model()
    assert_equal(load_model(finished / f"{family}{name}"), load_model(tmp_path / "one"))


@pytest.mark.parametrize("name", ["vit", "resnet", "vit, reach", "resnet, reach"])
def test_a_run_resumed_in_mid_flight_is_the_whole_run(finished, name):
    assert_equal(load_model(finished / f"{name}, resumed"), load_model(finished / name))


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_kept_graph_gives_what_running_again_does_with_the_same_weights(finished, family):
    """In one step nothing has changed while the gradient was on its way."""
    one = load_model(finished / f"{family}, one step")
    assert_equal(load_model(finished / f"{family}, one step, kept"), one)
    start = make_model(family).state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in one.items() if value.is_floating_point())


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_both_gradients_move_the_first_block(finished, family):
    both, late = load_model(finished / f"{family}, both"), load_model(finished / family)
    assert all(value.isfinite().all() for value in both.values())
    different = [name for name, value in both.items() if not torch.equal(value, late[name])]
    assert len(different) > len(both) / 3
