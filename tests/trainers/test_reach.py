"""The schedule of the task's gradient: exact at both ends of the dial, and in between what each step says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback, get_scheduler

from lopt_hf import LoPTConfig
from lopt_hf.local.embeddings import untie_output_embeddings
from lopt_hf.local.schedule import ReachSchedule
from lopt_hf.meters.gradient_bytes import GradientBytes
from lopt_hf.meters.saved_bytes import SavedBytes
from tests.tiny import FAMILIES, make_model
from tests.trainers.families import SHARED_KEYS, make_family
from tests.trainers.helpers import (
    KINDS,
    InTwoForwards,
    WithFixedCompletions,
    kind_kwargs,
    make_stock_trainer,
    make_trainer,
    snapshot,
    training_args,
)
from tests.trainers.test_local_step import end
from tests.trainers.test_resume import assert_equal

NONE = {"local_objective": "none"}
FULL = {**NONE, "num_blocks": 3, "task_reach": 3, "clip_scope": "global"}
CLIPPED = {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "weight_decay": 0.1}
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "loss_type": "grpo"}  # where our defaults are the paper's
ROUTERS = {"output_router_logits": True}
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def untied(family: str = "llama", **overrides: Any) -> Any:
    model = make_model(family, **overrides)
    untie_output_embeddings(model)
    return model


def untied_family(family: str) -> Any:
    model = make_family(family)
    untie_output_embeddings(model)
    return model


def adapter(lora: bool, targets: str | list[str] = "all-linear") -> dict[str, Any] | None:
    torch.manual_seed(0)
    return {"peft_config": LoraConfig(target_modules=targets, init_lora_weights=False)} if lora else None


def assert_stock_weights(tmp_path: Path, family: str = "llama", kind: str = "sft", **settings: Any) -> None:
    """At a reach of all blocks the weights are those of TRL's own trainer, bit for bit."""
    overrides = settings.pop("overrides", {})
    options = {key: settings.pop(key) for key in list(settings) if key == "reach_recompute"}
    given = {"kind": kind, **CLIPPED, **settings}
    ours = make_trainer(tmp_path / "ours", untied(family, **overrides), **FULL, **options, **given)
    stock = make_stock_trainer(tmp_path / "stock", untied(family, **overrides), **given)
    before = snapshot(ours)
    for trainer in (ours, stock):
        torch.manual_seed(1)
        trainer.train()
    expected = {name: p.detach() for name, p in stock.model.named_parameters() if p.requires_grad}
    weights = snapshot(ours)
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert all(not torch.equal(before[name], weights[name]) for name in weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_reach_is_the_stock_trainer(tmp_path, family):
    assert_stock_weights(tmp_path, family)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_full_reach_is_the_stock_trainer_of_every_kind(tmp_path, kind):
    assert_stock_weights(tmp_path, kind=kind, **(SAMPLING if kind == "grpo" else {}))


@pytest.mark.parametrize(
    "settings",
    [
        {"reach_recompute": False},
        {"reach_recompute": False, "family": "mixtral", "overrides": ROUTERS},
        {"gradient_accumulation_steps": 3},
        {"packing": True, "max_length": 48},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"family": "gpt2", "overrides": DROPOUT},
        {"family": "gpt2", "overrides": DROPOUT, "reach_recompute": False},
        {"family": "mixtral", "overrides": ROUTERS},
        {"family": "mixtral", "overrides": {**ROUTERS, "router_jitter_noise": 0.1}},
        {"family": "qwen3_moe", "overrides": ROUTERS, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_full_reach_is_the_stock_trainer_with_every_option(tmp_path, settings):
    assert_stock_weights(tmp_path, **settings)


def with_adapters(
    tmp_path: Path, make: Any, targets: str | list[str] = "all-linear", **settings: Any
) -> tuple[Any, Any]:
    """A trainer of ours with LoRA and TRL's own, from the same weights."""
    ours = make_trainer(tmp_path / "ours", make(), adapter(True, targets), **settings, **CLIPPED)
    model = make()
    stock = KINDS["sft"].stock_trainer(
        model=model,
        args=KINDS["sft"].stock_config(**training_args(tmp_path / "stock", **CLIPPED)),
        **kind_kwargs("sft", model, adapter(True, targets)),
    )
    stock.model.load_state_dict(snapshot(ours), strict=False)
    return ours, stock


def test_full_reach_is_the_stock_trainer_with_lora(tmp_path):
    assert_same_training(*with_adapters(tmp_path, untied, **FULL))


def assert_same_training(ours: Any, stock: Any) -> None:
    """The weights that are trained move, and end where TRL's do."""
    start = snapshot(ours)
    ours.train()
    stock.train()
    expected = {n: p for n, p in stock.model.named_parameters() if p.requires_grad}
    assert expected.keys() == start.keys()
    for name, weight in snapshot(ours).items():
        assert torch.equal(weight, expected[name]) and not torch.equal(weight, start[name]), name


def test_what_freezes_can_be_copied_into_what_reaches(tmp_path):
    frozen = LoPTConfig(str(tmp_path), local_objective="none")
    assert frozen.freezes_early_blocks and frozen.train_early_blocks
    assert not replace(frozen, task_reach=[2, 1]).freezes_early_blocks
    assert replace(frozen, local_objective="reconstruction", train_early_blocks=False).freezes_early_blocks


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 48}])
@pytest.mark.parametrize("lora", [False, True])
def test_no_reach_is_freezing(tmp_path, settings, lora):
    frozen = make_trainer(tmp_path / "f", None, adapter(lora), train_early_blocks=False, **CLIPPED, **settings)
    ours = make_trainer(tmp_path / "n", None, adapter(lora), **NONE, task_reach=1, **CLIPPED, **settings)
    frozen.train()
    ours.train()
    assert_equal(snapshot(ours), snapshot(frozen))


def gradients_of(trainer: Any, step: int = 0, position: int = 0) -> dict[str, torch.Tensor | None]:
    """The gradients of the first batch's micro-batch, at a place in the schedule."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.state.global_step, trainer.state.max_steps = step, trainer.args.max_steps
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with trainer.learner.micro_batch():
        trainer.learner._position = position
        trainer.compute_loss(trainer.model, inputs).backward()
        trainer.learner.after_backward()
    return {n: p.grad for n, p in trainer.model.named_parameters()}


def stock_gradients(tmp_path: Path, family: str, **overrides: Any) -> dict[str, torch.Tensor]:
    stock = make_stock_trainer(tmp_path / "stock", untied(family, **overrides))
    inputs = stock._prepare_inputs(next(iter(stock.get_train_dataloader())))
    stock.model.train()
    stock.current_gradient_accumulation_steps = 1
    stock.compute_loss(stock.model, inputs).backward()
    return {n: p.grad for n, p in stock.model.named_parameters()}


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_has_the_end_to_end_gradients_of_the_blocks_that_it_reaches(tmp_path, family, recompute):
    overrides = ROUTERS if "mixtral" in family or "moe" in family else {}
    expected = stock_gradients(tmp_path, family, **overrides)
    settings = {**NONE, "num_blocks": 3, "task_reach": [1, 2, 3], "reach_recompute": recompute}
    trainer = make_trainer(tmp_path, untied(family, **overrides), **settings)
    for step, reach in enumerate([1, 2, 3, 1]):
        gradients = gradients_of(trainer, step)
        for index, names in enumerate(trainer.learner.owned()):
            for name in names:
                if index < 3 - reach:
                    assert gradients[name] is None, (step, name)
                else:
                    torch.testing.assert_close(gradients[name], expected[name], rtol=1e-6, atol=1e-9)


def test_half_the_reach_in_twice_the_blocks_holds_fewer_activations_and_trains_the_same(tmp_path):
    """`[4, 2, 2, 2]` of four blocks is `[2, 1, 1, 1]` of two, whose last block is then computed in two parts."""
    settings = {**NONE, "reach_unit": "run", "max_steps": 4, **CLIPPED, "clip_scope": "global"}
    ends, bytes_held = [], []
    for blocks, reach in ((2, [2, 1, 1, 1]), (4, [4, 2, 2, 2])):
        trainer = make_trainer(tmp_path, num_blocks=blocks, task_reach=reach, **settings)
        with SavedBytes(trainer.model) as meter:
            trainer.train()
        bytes_held.append(meter.peak)
        ends.append({name: tensor for name, tensor in trainer.model.state_dict().items()})
    assert_equal(*ends)
    assert bytes_held[1] < bytes_held[0]


@pytest.mark.parametrize("unit", ["run", "step"])
def test_a_run_that_is_too_short_for_its_schedule_says_so(tmp_path, caplog, unit):
    settings = {**NONE, "task_reach": [1, 1, 1, 2], "reach_unit": unit}
    too_few = "The run's 3 steps are too few for task_reach=[1, 1, 1, 2]: the task's gradient reaches the last 1 of 2"
    for steps in (4, 3):
        make_trainer(tmp_path, **settings, max_steps=steps).train()
        assert any(record.message.startswith(too_few) for record in caplog.records) is (steps == 3)
    assert ReachSchedule((2, 1, 1, 1), 2, unit).furthest(1) == 2


def test_a_step_changes_the_blocks_that_it_reaches(tmp_path):
    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.moved: list[set[int]] = []

        def on_step_begin(self, *args, **kwargs):
            self.before = snapshot(trainer)

        def on_step_end(self, *args, **kwargs):
            after = snapshot(trainer)
            owned = trainer.learner.owned()
            self.moved.append({i for i, b in enumerate(owned) if any((after[n] != self.before[n]).any() for n in b)})

    watch = Watch()
    given = {"callbacks": [watch]}
    # With weight decay and momentum: what is not reached keeps still all the same.
    trainer = make_trainer(tmp_path, None, given, **NONE, num_blocks=4, task_reach=[1, 4, 2], max_steps=6, **CLIPPED)
    trainer.train()
    assert watch.moved == [{3}, {0, 1, 2, 3}, {2, 3}] * 2


def test_a_schedule_over_the_run(tmp_path):
    """Each number holds for an equal part of the steps, however many there are."""
    schedule = LoPTConfig(str(tmp_path), **NONE, num_blocks=4, task_reach=[4, 2, 1], reach_unit="run").schedule
    for total in (3, 6, 30):
        third = total // 3
        assert [schedule.at(step, 0, total) for step in range(total)] == [4] * third + [2] * third + [1] * third
    assert [schedule.at(step, 0, 2) for step in range(2)] == [4, 2]
    trainer = make_trainer(tmp_path, **NONE, task_reach=[2, 1], reach_unit="run", max_steps=6)
    moved = []
    for step in range(6):
        gradients = gradients_of(trainer, step)
        moved.append(gradients["model.embed_tokens.weight"] is not None)
    assert moved == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("family", "overrides"), [("llama", {}), ("mixtral", {**ROUTERS, "router_aux_loss_coef": 10.0})]
)
@pytest.mark.parametrize("recompute", [True, False])
def test_the_gradients_of_some_micro_batches_are_unbiased(tmp_path, recompute, family, overrides):
    """That of the routers' load-balancing loss too, which does not come through the hidden states."""
    settings = {**NONE, "num_blocks": 3, "task_reach": [1, 2, 1, 3], "reach_unit": "microbatch"}
    settings |= {"gradient_accumulation_steps": 4, "reach_recompute": recompute}
    trainer = make_trainer(tmp_path, untied(family, **overrides), **settings)
    whole = gradients_of(trainer, position=3)
    expected = stock_gradients(tmp_path, family, **overrides)
    for index, factor in enumerate([4.0, 2.0, 1.0]):  # block 0: one of four micro-batches, block 1: two
        for name in trainer.learner.owned()[index]:
            torch.testing.assert_close(whole[name], expected[name] * factor, rtol=1e-5, atol=1e-8)
    part = gradients_of(trainer, position=1)
    for index, names in enumerate(trainer.learner.owned()):
        for name in names:
            assert (part[name] is None) is (index == 0)
            if index:
                torch.testing.assert_close(part[name], expected[name] * [4.0, 2.0, 1.0][index], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("objective", ["none", "reconstruction"])
def test_an_epoch_that_ends_in_the_middle_of_a_step(tmp_path, objective):
    """Of a stream, whose length is not known: the next step counts its micro-batches anew, and none is lost."""
    settings = {"local_objective": objective, "num_blocks": 2, "task_reach": [1, 2], "reach_unit": "microbatch"}
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=3, max_steps=3, **settings)
    trainer.train_dataset = trainer.train_dataset.select(range(16)).to_iterable_dataset()  # four batches
    reaches, kept = [], []
    finish, begin = trainer.learner.after_backward, trainer.learner.begin_step

    def finished():
        reaches.append(trainer.learner._micro_batch.reach)
        finish()

    def begun():
        reaches.append("step")
        kept.append([parameter.grad is not None for parameter in trainer.learner.heads.parameters()])
        begin()

    trainer.learner.after_backward, trainer.learner.begin_step = finished, begun
    trainer.train()
    assert reaches == ["step", 1, 2, 1, "step", 1, "step", 1, 2, 1, "step", 1, "step", 1, 2, 1][: len(reaches)]
    assert len(reaches) > 8 and all(all(grads) for grads in kept[2::2]), "the heads keep what the model keeps"


def test_every_accumulated_step_trains_all_blocks(tmp_path):
    settings = {**NONE, "num_blocks": 2, "task_reach": [1, 2], "reach_unit": "microbatch"}
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1, **settings)
    before = snapshot(trainer)
    trainer.train()
    assert all(not torch.equal(weight, before[name]) for name, weight in snapshot(trainer).items())


@pytest.mark.parametrize("objective", ["reconstruction", "readout"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_tasks_gradient_is_added_to_the_local_one(tmp_path, family, objective):
    """Of early blocks at a reach step; at the others they have the local one alone."""
    settings = {"local_objective": objective, "num_blocks": 3}
    # Where the task reaches a router, the load-balancing loss is the model's own and not the block's.
    overrides = {"router_aux_loss_coef": 0.0} if family == "mixtral" else {}
    local = gradients_of(make_trainer(tmp_path / "local", untied(family, **overrides), **settings))
    task = stock_gradients(tmp_path, family, **overrides)
    for backward in ("eager", "joint"):
        model = untied(family, **overrides)
        trainer = make_trainer(tmp_path / "both", model, **settings, task_reach=[1, 3], local_backward=backward)
        if backward == "eager":
            assert_equal(gradients_of(trainer, step=0), local)
        both = gradients_of(trainer, step=1)
        for index, names in enumerate(trainer.learner.owned()):
            for name in names:
                expected = task[name] if index == 2 else task[name] + local[name]
                torch.testing.assert_close(both[name], expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("local_step", [False, True])
def test_a_loss_of_two_forwards(tmp_path, local_step):
    """Each of them is run again, and the gradients are those of one forward."""
    settings = {**NONE, "num_blocks": 3, "task_reach": 3, "kind": "grpo", "optim": "sgd", "local_step": local_step}
    moved = []
    for trainer_class in (WithFixedCompletions, InTwoForwards):
        trainer = make_trainer(tmp_path / trainer_class.__name__, trainer_class=trainer_class, **settings)
        before = snapshot(trainer)
        trainer.train()
        moved.append({name: weight - before[name] for name, weight in snapshot(trainer).items()})
    for name, change in moved[0].items():
        assert change.any(), name
        torch.testing.assert_close(moved[1][name], change, rtol=1e-4, atol=1e-7)


LOCAL_STEP = {**NONE, "num_blocks": 3, "task_reach": [1, 3, 2], "max_steps": 6, **CLIPPED}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_scope": "part"},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"local_objective": "reconstruction"},
        {"reach_rate": "inverse"},
        {"optim": "adafactor"},
        {"clip_scope": "part", "kind": "grpo", "trainer_class": InTwoForwards},
    ],
    ids=str,
)
def test_local_step_changes_nothing(tmp_path, settings):
    given = {**LOCAL_STEP, **settings}
    local, deferred = (make_trainer(tmp_path / str(on), local_step=on, **given) for on in (True, False))
    for trainer in (local, deferred):
        torch.manual_seed(1)  # GRPO draws the order of its completions
        trainer.train()
    assert_equal(end(local), end(deferred))


def test_one_blocks_activations_and_gradients_at_a_time(tmp_path):
    model = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 256}
    settings = {**NONE, "num_blocks": 4, "clip_scope": "part", "local_step": True, "max_steps": 1}
    peaks = {}
    for name, reach, given in (("reach", 4, settings), ("joined", 4, {**NONE, "num_blocks": 4})):
        trainer = make_trainer(
            tmp_path / name, untied(**model), **given, task_reach=reach, reach_recompute=name == "reach"
        )
        with SavedBytes(trainer.model) as saved, GradientBytes(trainer.model.parameters()) as gradients:
            trainer.train()
        peaks[name] = saved.peak, gradients.peak
    assert peaks["reach"][0] <= 0.35 * peaks["joined"][0]
    assert peaks["reach"][1] <= 0.35 * peaks["joined"][1]


@pytest.mark.parametrize("unit", ["step", "run", "annealed run", "microbatch"])
def test_a_run_resumed_in_mid_cycle_equals_the_uninterrupted_one(tmp_path, unit):
    settings = {**NONE, "num_blocks": 4, "task_reach": [1, 2, 4], "reach_unit": unit, "max_steps": 8, **CLIPPED}
    if unit == "annealed run":
        settings |= {"reach_unit": "run", "reach_anneal": True, "task_reach": [4, 4, 4, 2, 1]}
    settings |= {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}
    settings |= {"reach_rate": "sqrt"} if unit == "step" else {}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    saving = {**settings, "save_strategy": "steps", "save_steps": 5}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    make_trainer(tmp_path / "part", None, {"callbacks": [Stop()]}, **saving).train()
    resumed = make_trainer(tmp_path / "part", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(end(resumed), end(whole))


def test_another_schedule_does_not_go_on_from_a_checkpoint(tmp_path):
    saving = {"num_blocks": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, **NONE, task_reach=[1, 2], **saving).train()
    for others in ({**NONE, "task_reach": 2}, {}):
        with pytest.raises(ValueError, match=r"task_reach|local_objective"):
            make_trainer(tmp_path, **others, **saving).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [1e-3, 1e-3, 1e-3]),
        ({"reach_rate": "sqrt"}, [2e-3, 2**0.5 * 1e-3, 1e-3]),
        ({"reach_rate": "inverse"}, [4e-3, 2e-3, 1e-3]),
        ({"reach_rate": "inverse", "reach_rate_limit": 3}, [3e-3, 2e-3, 1e-3]),
        ({"reach_rate": "inverse", "early_learning_rate": 5e-4}, [5e-4, 5e-4, 1e-3]),
    ],
)
def test_rates_follow_from_how_often_a_block_is_reached(tmp_path, caplog, settings, rates):
    trainer = make_trainer(tmp_path, **NONE, num_blocks=3, task_reach=[1, 2, 1, 3], **settings, max_steps=1)
    trainer.train()
    rate_of = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for names, rate in zip(trainer.learner.owned(), rates, strict=True):
        assert [rate_of[id(p)] for p in names.values()] == pytest.approx([rate] * len(names))
    said = next(r.message for r in caplog.records if r.message.startswith("task_reach="))
    assert all(f"{rate:.3g}" in said for rate in rates) and "0.25, 0.5, 1" in said


@pytest.mark.parametrize(("kind", "warmup"), [("linear", 0), ("cosine", 0.25)])
def test_a_blocks_rate_runs_through_its_schedule_while_it_is_reached(tmp_path, kind, warmup):
    class Rates(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[int, float]] = []

        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            self.seen.append({id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]})

    rates = Rates()
    settings = {**NONE, "num_blocks": 3, "task_reach": [3, 2, 1], "reach_unit": "run", "reach_anneal": True}
    settings |= {"lr_scheduler_type": kind, "warmup_steps": warmup, "max_steps": 12}
    trainer = make_trainer(tmp_path, None, {"callbacks": [rates]}, **settings)
    trainer.train()
    for names, steps in zip(trainer.learner.owned(), (4, 8, 12), strict=True):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=trainer.args.learning_rate)
        schedule = get_scheduler(kind, optimizer, int(warmup * steps), steps)  # that of a run of so many steps
        expected = []
        for _ in range(steps):
            expected.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        for parameter in names.values():
            seen = [of_step[id(parameter)] for of_step in rates.seen]
            assert seen == pytest.approx(expected + [0.0] * (12 - steps))


def test_a_schedule_that_follows_the_loss(tmp_path):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "metric_for_best_model": "loss"}
    rows = {"eval_dataset": make_trainer(tmp_path).train_dataset}
    trainer = make_trainer(tmp_path, None, rows, **NONE, task_reach=[1, 2], max_steps=2, **plateau)
    before = snapshot(trainer)
    trainer.train()
    assert all(not torch.equal(weight, before[name]) for name, weight in snapshot(trainer).items())


def test_annealing_needs_the_trainers_own_schedule(tmp_path):
    settings = {**NONE, "task_reach": [2, 1], "reach_unit": "run", "reach_anneal": True}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="reach_anneal=True has no effect on an optimizer or a scheduler of your own"):
        make_trainer(tmp_path, None, {"optimizers": (optimizer, None)}, **settings)
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "metric_for_best_model": "loss"}
    rows = {"eval_dataset": make_trainer(tmp_path).train_dataset}
    trainer = make_trainer(tmp_path, None, rows, **settings, **plateau)
    with pytest.raises(ValueError, match="ReduceLROnPlateau follows the loss; set lr_scheduler_type"):
        trainer.train()


@pytest.mark.parametrize("family", SHARED_KEYS)
@pytest.mark.parametrize("recompute", [True, False])
def test_keys_that_later_blocks_share_are_not_lost(tmp_path, family, recompute):
    """Their gradient passes by the hidden states, which alone a block that runs again is given one for."""
    settings = {**FULL, "num_blocks": 2, "task_reach": 2, "reach_recompute": recompute}
    ours, stock = with_adapters(tmp_path, lambda: untied_family(family), ATTENTION, **settings)
    if not recompute:
        return assert_same_training(ours, stock)
    with pytest.raises(RuntimeError, match="leaves more than hidden states to later layers.*reach_recompute to False"):
        ours.train()


@pytest.mark.parametrize("text", ["[1,1,1,4]", "1,1,1,4", (1, 1, 1, 4)])
def test_a_cycle_is_read_from_text(tmp_path, text):
    config = LoPTConfig(str(tmp_path), num_blocks=4, task_reach=text, **NONE)
    assert config.task_reach == [1, 1, 1, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_reach": 3}, "task_reach=[3]: 3 is not a number of blocks from 1 to num_blocks=2"),
        ({"task_reach": 0}, "task_reach=[0]: 0 is not"),
        ({"task_reach": []}, "task_reach=[] is an empty cycle"),
        ({"task_reach": "two"}, "task_reach='two' is not a number of blocks"),
        ({"task_reach": [1, 2.0]}, "task_reach=[1, 2.0] is not a number"),
        ({"task_reach": True}, "task_reach=True is not a number"),
        ({"num_blocks": 4, "task_reach": [1, 2]}, "never reaches the first 2 blocks of num_blocks=4"),
        ({"task_reach": 2, "reach_unit": "epoch"}, "reach_unit='epoch' is unknown"),
        ({"task_reach": 2, "reach_rate": "cube"}, "reach_rate='cube' is unknown"),
        ({"task_reach": 2, "reach_rate_limit": 0.5}, "reach_rate_limit=0.5 is too low"),
        ({"task_reach": 2, "reach_rate_limit": 2}, "reach_rate_limit=2 does nothing with reach_rate='none'; leave it"),
        ({"task_reach": [1, 2], "reach_unit": "microbatch"}, "set gradient_accumulation_steps to at least 2"),
        (
            {"task_reach": [1, 2], "reach_unit": "microbatch", "reach_rate": "sqrt"},
            "reach_rate='sqrt' does not go with",
        ),
        ({"reach_unit": "run"}, "reach_unit='run' does nothing with task_reach=[1]"),
        ({"task_reach": 2, "reach_unit": "run"}, "reach_unit='run' does nothing with task_reach=[2]"),
        ({"reach_rate": "sqrt"}, "reach_rate='sqrt' does nothing with task_reach=[1]"),
        ({"task_reach": 2, "train_early_blocks": False}, "train_early_blocks=False freezes"),
        ({"task_reach": 2, "local_step": True, "reach_recompute": False}, "reach_recompute=False, where all"),
        ({"task_reach": 1, "local_step": True}, "task_reach=1, which leave it nothing to do"),
        (
            {"task_reach": 2, "local_objective": "reconstruction", "reach_recompute": False},
            "does not work with reach_recompute=False, one graph",
        ),
        (
            {
                "task_reach": 2,
                "local_objective": "reconstruction",
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            "does not work with reentrant checkpointing",
        ),
        ({"task_reach": 2, "reconstruction_weight": 1.0}, "reconstruction_weight=1.0 does nothing"),
        ({"task_reach": 2, "local_update_interval": 2}, "local_update_interval=2 does nothing"),
        ({"task_reach": [2, 1], "reach_anneal": True}, "reach_anneal=True does nothing with reach_unit='step'"),
        (
            {"task_reach": [2, 1], "reach_unit": "run", "reach_anneal": True, "lr_scheduler_type": "constant"},
            "reach_anneal=True does nothing with lr_scheduler_type='constant'",
        ),
        (
            {"num_blocks": 4, "task_reach": 3, "local_objective": "readout", "use_liger_kernel": True},
            "does not work with use_liger_kernel=True",
        ),
        (
            {"num_blocks": 4, "task_reach": 4, "local_objective": "reconstruction", "activation_offloading": True},
            "does not work with activation_offloading=True",
        ),
        (
            {"task_reach": [2, 1], "reach_unit": "run", "reach_anneal": True, "local_objective": "reconstruction"},
            "reach_anneal=True would end the blocks' local objective",
        ),
        (
            {
                "task_reach": 2,
                "local_objective": "reconstruction",
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": True},
            },
            "does not work with reentrant checkpointing",
        ),
        ({"task_reach": 2, "optim": "lomo"}, "reach_recompute=True does not work with optim='lomo'"),
    ],
    ids=str,
)
def test_bad_input(tmp_path, settings, message):
    with pytest.raises(ValueError) as error:
        LoPTConfig(str(tmp_path), **{**NONE, **settings})
    assert message in str(error.value) and "\n" not in str(error.value)
