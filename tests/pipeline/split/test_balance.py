"""Balanced cuts against brute force, and the costs they rest on for every family."""

import itertools
import random
import statistics
from time import perf_counter

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from lopt_hf import MLAANPipelineConfig
from lopt_hf.data.pretrained import SMOLLM2_ID, resolve_model
from lopt_hf.local.layer_calls import LayerCall
from lopt_hf.pipeline.split import costs as costs_module
from lopt_hf.pipeline.split.auxiliaries import with_auxiliaries
from lopt_hf.pipeline.split.balance import balanced_split, format_split, stage_costs
from lopt_hf.pipeline.split.costs import measure_costs
from lopt_hf.pipeline.split.model_costs import ModelCosts
from lopt_hf.pipeline.split.stopwatch import PartCost
from tests.tiny import FAMILIES, make_model
from tests.trainers.helpers import make_trainer

NOTHING = PartCost(0.0, 0.0, 0)


def random_costs(seed, num_layers):
    rng = random.Random(seed)

    def part(scale=1.0):
        return PartCost(scale * rng.random(), scale * rng.random(), rng.randrange(10**6))

    layers = tuple(part() for _ in range(num_layers))
    return ModelCosts(part(), layers, part(3), part(5), step_seconds=rng.choice([0.0, 1e-6]), accumulation_steps=2)


def slowest(costs, split_at):
    return max(stage.total for stage in stage_costs(costs, split_at))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(8))
def test_no_cut_has_a_faster_slowest_stage(seed, num_stages):
    costs = random_costs(seed, num_layers=7 + seed % 3)
    cuts = itertools.combinations(range(1, len(costs.layers)), num_stages - 1)
    best = min(slowest(costs, cut) for cut in cuts)
    split_at = balanced_split(costs, num_stages)
    assert len(split_at) == num_stages - 1
    assert slowest(costs, split_at) == best


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_no_cut_of_stages_with_two_layers_has_a_faster_slowest_stage(seed, num_stages):
    costs = random_costs(seed, num_layers=7 + seed % 3)
    cuts = itertools.combinations(range(1, len(costs.layers)), num_stages - 1)
    edges = ((0, *cut, len(costs.layers)) for cut in cuts)
    fit = [edge[1:-1] for edge in edges if all(b - a >= 2 for a, b in itertools.pairwise(edge))]
    split_at = balanced_split(costs, num_stages, least_layers=2)
    assert tuple(split_at) in fit
    assert slowest(costs, split_at) == min(slowest(costs, cut) for cut in fit)


def test_more_stages_than_layers():
    with pytest.raises(ValueError, match="num_stages=5 does not fit a model with 4 layers"):
        balanced_split(random_costs(0, 4), 5)
    with pytest.raises(ValueError, match="num_stages=3 does not fit .* choose a number from 1 to 2"):
        balanced_split(random_costs(0, 5), 3, least_layers=2)


def test_what_a_stage_is_charged():
    layer, part = PartCost(1.0, 2.0, 10), PartCost(100.0, 200.0, 1000)
    costs = ModelCosts(part, (layer,) * 4, PartCost(5.0, 6.0, 7), PartCost(30.0, 60.0, 500), 0.5, accumulation_steps=2)
    first, middle, last = stage_costs(costs, [1, 3])
    assert (first.forward, first.backward, first.local) == (101.0, 202.0, 11.0)
    assert (middle.forward, middle.backward, middle.local) == (2.0, 4.0, 11.0)
    assert (last.forward, last.backward, last.local) == (31.0, 62.0, 0.0)
    assert [stage.optimizer for stage in (first, middle, last)] == [1017 * 0.25, 27 * 0.25, 510 * 0.25]
    assert first.total == 101 + 202 + 11 + 1017 * 0.25


def test_what_a_stage_with_an_auxiliary_is_charged(tmp_path):
    """Half of the layers that follow, run again in their backward, and two losses."""
    layer = PartCost(1.0, 2.0, 10)
    costs = ModelCosts(NOTHING, (layer,) * 8, PartCost(5.0, 7.0, 0), NOTHING, step_seconds=1.0)
    args = MLAANPipelineConfig(output_dir=str(tmp_path), leap_share=0.5, activation_checkpointing=False)
    first, last = stage_costs(with_auxiliaries(costs, args), [2])
    assert (first.local, first.optimizer) == (3 * (1 + 2 + 1) + 2 * (5 + 7), 20 + 30)
    assert last.local == 0.0
    args.independent_weight, args.auxiliary_checkpointing = 0.0, False
    assert stage_costs(with_auxiliaries(costs, args), [2])[0].local == 3 * (1 + 2) + 5 + 7


def test_a_head_that_costs_four_layers_moves_the_cut():
    layer = PartCost(1.0, 2.0, 0)
    costs = ModelCosts(NOTHING, (layer,) * 12, NOTHING, PartCost(4.0, 8.0, 0), 0.0)
    assert balanced_split(costs, 2) == [8]
    stages = stage_costs(costs, balanced_split(costs, 4))
    assert stages[-1].total == 15.0  # the slowest, and the others are as even as that allows
    assert sorted(stage.total for stage in stages[:-1]) == [9.0, 12.0, 12.0]


def test_the_table_names_every_stage():
    costs = ModelCosts(NOTHING, (PartCost(0.01, 0.02, 0),) * 6, PartCost(0.004, 0.0, 0), PartCost(0.03, 0.0, 0), 0.0)
    header, _, first, second = format_split(costs, [4]).splitlines()
    assert "layers" in header and "backward (ms)" in header
    assert first == "| 0 | 0-3 | 40.0 | 80.0 | 4.0 | 0.0 | 124.0 | 100% |"
    assert second == "| 1 | 4-5 | 50.0 | 40.0 | 0.0 | 0.0 | 90.0 | 73% |"


PART = PartCost(1.0, 2.0, 10)
EVEN = ModelCosts(PART, (PART,) * 4, PartCost(3.0, 4.0, 5), PART, 1.0, objectives={2: PartCost(1.0, 2.0, 5)})


@pytest.mark.parametrize(
    ("gradient", "recompute", "reaches", "forwards", "backwards"),
    [
        ("local", True, (), 1, 1),
        ("delayed", True, (), 2, 1),
        ("delayed", False, (), 1, 1),
        ("local_and_delayed", True, (), 2, 2),
        ("delayed", True, (1, 1, 1, 2), 1.25, 0.25),  # of the other steps nothing runs again, and nothing backward
        ("delayed", False, (1, 1, 1, 2), 1, 0.25),
        ("local_and_delayed", True, (2, 1), 1.5, 1.5),
    ],
)
def test_how_often_a_stage_with_late_gradients_runs(gradient, recompute, reaches, forwards, backwards):
    """The last one, whose gradient does not come late, once; and with the task's gradient alone nothing is local."""
    first, last = stage_costs(EVEN.with_gradient(gradient, recompute, reaches), [2])
    assert (first.forward, first.backward) == (3 * forwards, 6 * backwards)
    # Without an objective the optimizer steps where the gradient has come.
    assert (first.local, first.optimizer) == ((0.0, 30.0 * backwards) if gradient == "delayed" else (3.0, 35.0))
    assert last == stage_costs(EVEN, [2])[1]


def test_a_gradient_may_travel_to_some_stages_only():
    """Of four steps to the middle stage at two, to the first at one."""
    stages = stage_costs(EVEN.with_gradient("delayed", reaches=(1, 2, 1, 3)), [1, 2])
    assert [stage.forward for stage in stages] == [2 * 1.25, 1.5, 3]
    assert [stage.backward for stage in stages] == [4 * 0.25, 2 * 0.5, 6]


def test_late_gradients_move_the_cut():
    layer = PartCost(1.0, 2.0, 0)
    costs = ModelCosts(NOTHING, (layer,) * 12, NOTHING, NOTHING, 0.0)
    assert balanced_split(costs, 2) == [6]
    assert balanced_split(costs.with_gradient("delayed"), 2) == [5]  # 4 F a layer, and 3 F on the last stage
    assert balanced_split(costs.with_gradient("local_and_delayed"), 2) == [4]  # 6 F
    assert balanced_split(costs.with_gradient("delayed", reaches=(1, 1, 1, 2)), 2) == [8]  # 1.75 F
    # Of three stages the first, to which no gradient travels, has the most layers, as brute force finds
    some = costs.with_gradient("delayed", reaches=(1, 2))
    cuts = itertools.combinations(range(1, 12), 2)
    split_at = balanced_split(some, 3)
    assert slowest(some, split_at) == min(slowest(some, cut) for cut in cuts)
    assert split_at[0] == max(b - a for a, b in itertools.pairwise([0, *split_at, 12]))


# ---- Measured costs ----


def quick(model, **settings):
    return measure_costs(model, batch_size=2, seq_length=8, repeats=1, least_seconds=0.0, **settings)


@pytest.mark.parametrize("objective", ["reconstruction", "readout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(family, objective):
    model = make_model(family)
    costs = quick(model, objective=objective, activation_checkpointing=objective == "readout")
    parts = [costs.embeddings, *costs.layers, costs.head]
    assert len(costs.layers) == 4 and all(part.forward > 0 and part.backward > 0 for part in parts)
    assert costs.objective.forward > 0 and costs.step_seconds > 0
    head = model.get_output_embeddings().weight
    copied = head.numel() if head is model.get_input_embeddings().weight else 0  # by untying
    assert sum(part.num_trainable for part in parts) == model.num_parameters() + copied
    assert len(balanced_split(costs, 2)) == 1


def test_a_tied_head_trains_a_copy_or_not_at_all():
    model = make_model(tie_word_embeddings=True)
    weight, norm = model.lm_head.weight.numel(), model.model.norm.weight.numel()
    untied, frozen = quick(model), quick(model, tied_embeddings="freeze")
    assert (untied.embeddings.num_trainable, untied.head.num_trainable) == (weight, weight + norm)
    assert (frozen.embeddings.num_trainable, frozen.head.num_trainable) == (0, norm)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("objective", ["reconstruction", "readout"])
def test_of_an_adapter_only_its_own_parameters_train(objective):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    costs = quick(make_model(tie_word_embeddings=True), objective=objective, peft_config=config)
    trained = get_peft_model(make_model(), config).get_nb_trainable_parameters()[0]
    assert sum(layer.num_trainable for layer in costs.layers) == trained
    assert costs.embeddings.num_trainable == costs.head.num_trainable == 0
    assert costs.step_seconds > 0 and all(layer.backward > 0 for layer in costs.layers)


def test_an_adapter_of_some_layers_is_measured_on_one_that_has_it():
    config = LoraConfig(r=2, target_modules=r".*layers\.(1|3)\..*q_proj", task_type="CAUSAL_LM")
    costs = quick(make_model(), peft_config=config)
    trained = get_peft_model(make_model(), config).get_nb_trainable_parameters()[0]
    assert [layer.num_trainable for layer in costs.layers] == [0, trained // 2, 0, trained // 2]
    assert costs.step_seconds > 0 and all(layer.backward > 0 for layer in costs.layers)


@pytest.mark.parametrize(
    ("family", "overrides", "kinds"),
    [
        ("llama", {}, 1),
        ("gemma2", {}, 2),  # sliding and full attention
        ("qwen3_moe", {"decoder_sparse_step": 2}, 2),  # dense and sparse
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, 2),
    ],
)
def test_layers_of_one_kind_are_measured_once(family, overrides, kinds, monkeypatch):
    measured = []
    run_layer = LayerCall.__call__
    monkeypatch.setattr(
        LayerCall,
        "__call__",
        lambda call, layer, *hidden: measured.append(id(layer)) or run_layer(call, layer, *hidden),
    )
    quick(make_model(family, **overrides))
    assert len(set(measured)) == kinds


def test_one_part_is_in_memory_at_a_time(monkeypatch):
    """And nothing of it stays: neither weights, nor what drawing them did to the random state."""
    skeletons, present = [], []
    make_skeleton, measure = costs_module._skeleton, costs_module.Stopwatch.measure

    def note_skeleton(*args):
        skeletons.append(make_skeleton(*args))
        return skeletons[0]

    def note_present(self, forward, parameters):
        here = [name for name, parameter in skeletons[0].named_parameters() if not parameter.is_meta]
        present.append({name.removeprefix("transformer.").rsplit(".", 1)[0].split(".attn")[0] for name in here})
        return measure(self, forward, parameters)

    monkeypatch.setattr(costs_module, "_skeleton", note_skeleton)
    monkeypatch.setattr(costs_module.Stopwatch, "measure", note_present)
    config = make_model("gpt2").config
    before = torch.get_rng_state()
    quick(config, objective="readout")
    layer = {"h.0", "h.0.ln_1", "h.0.ln_2", "h.0.mlp.c_fc", "h.0.mlp.c_proj"}
    assert present == [{"wte", "wpe", "ln_f"}, layer, {"ln_f", "lm_head"}, {"ln_f", "lm_head"}]
    assert all(parameter.is_meta for parameter in skeletons[0].parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is too low"),
        ({"repeats": 0}, "repeats=0 is too low"),
        ({"objective": "contrastive"}, "objective='contrastive' is unknown; choose 'reconstruction' or 'readout'"),
        ({"tied_embeddings": "tie"}, "tied_embeddings='tie' is unknown"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        measure_costs(make_model().config, **{"batch_size": 1, "seq_length": 4, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reconstruction", "readout"])
def test_the_predicted_shares_of_smollm2s_stages_are_the_real_ones(objective, tmp_path):
    """One process, both stages in turns: each block's part of a step against what its stage is charged."""
    checkpoint = resolve_model(SMOLLM2_ID)
    costs = measure_costs(checkpoint, batch_size=2, seq_length=128, objective=objective)
    tokens = torch.randint(1000, 40_000, (12, 128)).tolist()
    trainer = make_trainer(
        tmp_path,
        checkpoint,
        {"train_dataset": Dataset.from_dict({"input_ids": tokens}), "processing_class": None},
        split_at=[18],
        local_objective=objective,
        per_device_train_batch_size=2,
        max_length=None,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    marks, shares = [], []
    trainer.stack.decoder.register_forward_pre_hook(lambda *args: marks.append(perf_counter()))
    trainer.stack.layers[17].register_forward_hook(lambda *args: marks.append(perf_counter()))  # after the boundary's
    for batch in trainer.get_train_dataloader():
        marks.clear()
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, trainer._prepare_inputs(batch), 2 * 127)
        start, boundary, end = *marks, perf_counter()
        shares.append((boundary - start) / (end - start))
    first, last = (stage.total - stage.optimizer for stage in stage_costs(costs, [18]))
    assert first / (first + last) == pytest.approx(statistics.median(shares[1:]), abs=0.05)
