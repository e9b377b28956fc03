"""What the simulation predicts, beside what real trainers do with real tensors."""

import copy
import gc
import statistics
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lopt_hf import LoPTConfig, LoPTTrainer, MLAANConfig, MLAANTrainer, RepLConfig, get_repl_model
from lopt_hf.common.compared_methods import PEERS, mlaan_window
from lopt_hf.local.methods.mlaan import method as mlaan_method
from lopt_hf.local.readout import TokenLoss
from lopt_hf.meters.gradient_bytes import GradientBytes
from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.peers.arguments import PeerArguments
from lopt_hf.peers.layer_switching import BAdam
from lopt_hf.planner.memory import CATEGORIES
from lopt_hf.planner.simulation import simulate
from lopt_hf.planner.step import Workload
from lopt_hf.planner.strategies import DEFAULT_STRATEGIES, REPL_EVERY, STRATEGIES, Strategy, make_strategies
from lopt_hf.planner.task_loss import PlannedTokenLoss
from tests.tiny import FAMILIES, VOCABULARY, make_model, make_tokenizer
from tests.trainers.helpers import training_args

BATCH, LENGTH, RANK = 2, 32, 4
WORKLOAD = Workload(BATCH, LENGTH, torch.float32, lora_r=RANK)
SMALL = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "falcon")


def tiny_config(family="llama", **overrides):
    special = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return AutoConfig.for_model(family, **{**special, **FAMILIES[family], **overrides})


def strategies(methods=STRATEGIES, num_gpus=2, num_layers=8):
    config = tiny_config(num_hidden_layers=num_layers)
    rows = make_strategies(methods, (2, 4), config, num_gpus, RANK)[0]
    there = [row.name for row in rows]
    alone = make_strategies(methods, (2, 4), config)[0]
    return rows + [row for row in alone if row.is_peer and row.name not in there]


class Peak(TrainerCallback):
    """The peaks of the saved bytes and of the gradients' in the last step."""

    def __init__(self):
        self.peaks = []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.saved = SavedBytes([*model.parameters(), *model.buffers(), *trained])
        self.gradients = GradientBytes(trained)
        self.saved.__enter__()
        self.gradients.__enter__()

    def on_step_end(self, *args, **kwargs):
        for counter in (self.saved, self.gradients):
            counter.__exit__(None, None, None)
        self.peaks.append((self.saved.peak, self.gradients.peak))

    @property
    def peak(self):
        return self.peaks[-1]

    @property
    def mean(self):
        return [statistics.fmean(values) for values in zip(*self.peaks, strict=True)]


class AllocatedPeak(TrainerCallback):
    """The most that torch's allocator has handed out in the second step, beyond what was there at its start."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self.profiler.__enter__()

    def on_train_end(self, *args, **kwargs):
        self.profiler.__exit__(None, None, None)
        allocated = self.peak = 0
        for event in self.profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                allocated += event.nbytes()
                self.peak = max(self.peak, allocated)


def has_wide_window(strategy):
    return strategy.method == "mlaan" and mlaan_window(strategy.num_blocks) > 1


def measure(strategy, family, folder, peak=None, **overrides):
    """Trains two steps by the trainer of the strategy; returns the peak of the last one."""
    model = make_model(family, **overrides)
    rows = Dataset.from_dict({"input_ids": [[3 + i % 50 for i in range(LENGTH)]] * 8 * BATCH})
    settings = training_args(folder, bf16=True, max_steps=2, per_device_train_batch_size=BATCH, max_length=None)
    if strategy.checkpointing:
        reentrant = strategy.method != "badam" and not has_wide_window(strategy)
        settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    peak = peak or Peak()
    given = {"train_dataset": rows, "processing_class": make_tokenizer(), "callbacks": [peak]}
    if strategy.method == "repl":
        model = get_repl_model(model, RepLConfig(placement="every", every=REPL_EVERY, init="skip"))
    if strategy.method == "lora":
        given["peft_config"] = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    if strategy.is_peer:
        peer = PeerArguments(num_blocks=strategy.num_blocks).make_peer(strategy.method)
        if strategy.method == "badam":  # all layers in turn
            peer = BAdam(period=1, order=range(model.config.num_hidden_layers))
            settings["max_steps"] = model.config.num_hidden_layers
        settings["max_grad_norm"] = 0.0 if strategy.method == "e2e_step_in_backward" else 1.0
        given["callbacks"].insert(0, peer)  # what looks at a step comes after what switches layers on and off
        SFTTrainer(model, SFTConfig(**settings), **given).train()
    elif strategy.method == "mlaan":
        args = MLAANConfig(**settings, num_blocks=strategy.num_blocks, window=mlaan_window(strategy.num_blocks))
        MLAANTrainer(model, args, **given).train()
    elif strategy.task_reach != (1,):
        reach = {"task_reach": list(strategy.task_reach), "local_objective": "none"}
        settings |= {**reach, "num_blocks": strategy.num_blocks, "max_steps": len(strategy.task_reach)}
        args = LoPTConfig(**settings, local_step=strategy.method.endswith("local_step"))
        LoPTTrainer(model, args, **given).train()
        return peak.mean if isinstance(peak, Peak) else peak.peak
    elif strategy.num_blocks > 1:
        backward = {"joint": "joint", "freeze": "auto"}.get(strategy.method, "eager")
        args = LoPTConfig(
            **settings,
            num_blocks=strategy.num_blocks,
            train_early_blocks=strategy.method != "freeze",
            local_backward=backward,
            local_step=strategy.method.endswith("local_step"),
        )
        LoPTTrainer(model, args, **given).train()
    else:
        SFTTrainer(model, SFTConfig(**settings), **given).train()
    return peak.peak


IN_ONE_PROCESS = [strategy for strategy in strategies() if strategy.method not in ("ppll", "badam")]


@pytest.mark.parametrize("strategy", IN_ONE_PROCESS, ids=lambda strategy: strategy.name)
def test_saved_bytes_and_gradients_are_those_of_the_real_trainer(strategy, tmp_path):
    overrides = {"num_hidden_layers": 8, "hidden_size": 64}
    [predicted] = simulate(tiny_config(**overrides), strategy, WORKLOAD)
    saved, gradients = measure(strategy, "llama", tmp_path, **overrides)
    assert predicted.gradient_bytes == round(gradients)
    if has_wide_window(strategy) and strategy.checkpointing:  # what is computed again cannot be seen
        assert predicted.saved_bytes is None
    else:
        assert predicted.saved_bytes == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        "end-to-end",
        "end-to-end, K=4 segments",
        "end-to-end, step in backward",
        "LoPT K=2",
        "LoPT K=4 + checkpointing",
        "LoPT K=4, local step",
        "MLAAN K=4, window 2",
    ],
)
def test_peak_of_all_memory_is_what_the_allocator_hands_out(name, tmp_path):
    """Temporaries, gradients and the loss's tiles included; on a CPU, whose allocator the profiler sees."""
    strategy = next(row for row in IN_ONE_PROCESS if row.name == name)
    overrides = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 2048}
    [predicted] = simulate(tiny_config(**overrides), strategy, WORKLOAD, on_gpu=False)
    there = predicted.peak["parameters"] + 8 * predicted.trainable  # AdamW's two moments
    measured = measure(strategy, "llama", tmp_path, AllocatedPeak(), **overrides)
    assert predicted.peak_bytes - there == pytest.approx(measured, rel=0.01)


def test_badam_is_the_mean_over_all_layers(tmp_path):
    strategy = Strategy("BAdam", "badam")
    overrides = {"num_hidden_layers": 8, "hidden_size": 64}
    [predicted] = simulate(tiny_config(**overrides), strategy, WORKLOAD)
    peaks = Peak()
    measure(strategy, "llama", tmp_path, peaks, **overrides)
    saved, gradients = peaks.mean
    assert len(peaks.peaks) == 8
    assert predicted.gradient_bytes == gradients
    assert predicted.saved_bytes == pytest.approx(saved, rel=0.01)
    [lowest] = simulate(tiny_config(**overrides), Strategy("", "e2e"), WORKLOAD)
    assert predicted.flops < 0.75 * lowest.flops  # a forward, and half a backward to the layers


def test_reach_is_a_mean_over_the_cycle_and_its_highest_peak():
    config = tiny_config(num_hidden_layers=8, hidden_size=64, intermediate_size=256)

    def cost(method, reach=(1,)):
        return simulate(config, Strategy("", method, 4, task_reach=reach), WORKLOAD)[0]

    frozen, segments, reach = cost("freeze"), cost("e2e_segments"), cost("reach", (1, 1, 1, 4))
    assert reach.peak_bytes >= segments.peak_bytes > frozen.peak_bytes
    assert reach.flops == pytest.approx((3 * frozen.flops + segments.flops) / 4, rel=0.01)
    assert reach.saved_bytes == pytest.approx(segments.saved_bytes, rel=0.1)
    assert cost("reach", (4,)).flops == pytest.approx(segments.flops, rel=0.01)


@pytest.mark.parametrize(("method", "num_layers"), [("lisa", 2), ("badam", 1)])
def test_state_of_the_trained_layers_only(method, num_layers):
    config = tiny_config(num_hidden_layers=8, tie_word_embeddings=False)
    [cost] = simulate(config, Strategy("", method), Workload(1, 2, torch.float32))
    layers = make_model("llama", num_hidden_layers=8, tie_word_embeddings=False).model.layers
    in_a_layer = sum(parameter.numel() for parameter in layers[0].parameters())
    trained = num_layers * in_a_layer + (cost.parameters - 8 * in_a_layer if method == "lisa" else 0)
    assert cost.trainable == cost.parameters
    assert cost.gradient_bytes == 4 * trained
    assert cost.peak["optimizer"] == pytest.approx(8 * trained, rel=0.01)


def test_reach_has_as_many_blocks_as_it_reaches():
    config = tiny_config(num_hidden_layers=8)
    rows, _ = make_strategies(("reach",), (2, 4), config)
    assert [row.name for row in rows[::2]] == ["K=2, reach 2,1,1,1", "K=4, reach 4,1,1,1"]
    rows, _ = make_strategies(("reach",), (2, 4), config, task_reach=(1, 2, 1, 4))
    assert [row.name for row in rows[::2]] == ["K=4, reach 1,2,1,4"]


def test_peers_that_a_run_cannot_have_are_left_out():
    config = tiny_config(num_hidden_layers=8)
    rows, left_out = make_strategies(PEERS, (2,), config, num_gpus=2)
    assert {row.method for row in rows} == {"freeze_last"}
    assert "LISA: it trains in one process, on one device." in left_out
    rows, left_out = make_strategies(PEERS, (2,), config, accumulation_steps=2)
    assert "e2e_step_in_backward" not in {row.method for row in rows}
    assert left_out[0] == "end-to-end, step in backward: a second micro-batch would find no gradients to add to."


@pytest.mark.parametrize("family", SMALL[1:])
def test_saved_bytes_of_other_families(family, tmp_path):
    strategy = Strategy("LoPT K=2", "lopt", 2)
    [predicted] = simulate(tiny_config(family), strategy, WORKLOAD)
    saved, _ = measure(strategy, family, tmp_path)
    assert predicted.saved_bytes == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_planned(family):
    workload = replace(WORKLOAD, dtype=torch.bfloat16)
    [whole], [cut], [leaping] = (
        simulate(tiny_config(family), Strategy(method, method, blocks), workload)
        for method, blocks in (("e2e", 1), ("lopt", 2), ("mlaan", 2))
    )
    assert 0 < cut.saved_bytes < whole.saved_bytes
    assert cut.flops < leaping.flops
    assert whole.parameters == sum(parameter.numel() for parameter in make_model(family).parameters())


@pytest.mark.parametrize("strategy", strategies()[::5], ids=lambda strategy: strategy.name)
def test_nothing_is_left_behind_and_nothing_changes(strategy):
    config = tiny_config(num_hidden_layers=8)
    before = copy.deepcopy(config.to_dict())
    state = torch.get_rng_state()
    costs = simulate(config, strategy, WORKLOAD)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(cost.peak.keys() == set(CATEGORIES) for cost in costs)


def test_weights_gradients_and_optimizer_state_of_fp32_adamw():
    """All at the peak, where the activations of a few tokens are nothing beside them."""
    workload = Workload(1, 2, torch.float32, accumulation_steps=2)
    [cost] = simulate(tiny_config(tie_word_embeddings=False), Strategy("end-to-end", "e2e"), workload)
    weights = 4 * cost.parameters
    assert cost.trainable == cost.parameters
    assert cost.peak["gradients"] == weights
    assert cost.peak["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert cost.peak["parameters"] == pytest.approx(weights, rel=0.01)


def test_bf16_halves_what_the_weights_need():
    end_to_end = Strategy("end-to-end", "e2e")
    [wide], [narrow] = (
        simulate(tiny_config(), end_to_end, Workload(BATCH, LENGTH, dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.peak["parameters"] == pytest.approx(wide.peak["parameters"] / 2, rel=0.01)


def test_accumulation_keeps_gradients_through_the_forward():
    end_to_end = Strategy("end-to-end", "e2e")
    one, several, more = (
        simulate(tiny_config(), end_to_end, Workload(BATCH, LENGTH, accumulation_steps=steps))[0]
        for steps in (1, 2, 6)
    )
    assert several.peak_bytes > one.peak_bytes
    assert several.peak == more.peak
    assert several.flops == 2 * one.flops
    assert more.flops == 6 * one.flops
    assert 2 * one.moved_bytes > several.moved_bytes  # the optimizer's step is done once


def test_ddp_keeps_a_copy_of_all_gradients():
    for method, blocks in (("e2e", 1), ("lopt", 2)):
        [cost] = simulate(tiny_config(), Strategy("", method, blocks), Workload(BATCH, LENGTH, num_gpus=2))
        heads = 2 if method == "lopt" else 1  # of LoPT the head is in fp32, and so is its gradient
        assert cost.peak["communication"] <= heads * cost.peak["parameters"]
        assert cost.peak["communication"] > 0.2 * cost.peak["parameters"]


def test_frozen_block_has_neither_gradients_nor_state():
    [cost] = simulate(tiny_config(num_hidden_layers=8), Strategy("freeze", "freeze", 2), WORKLOAD)
    assert cost.trainable < 0.6 * cost.parameters
    assert cost.peak["optimizer"] < 1.2 * cost.peak["parameters"]


def test_stages_share_the_model():
    """The parameters of all stages are those of the model with one head of LoPT for each early block."""
    config = tiny_config(num_hidden_layers=8, tie_word_embeddings=False)
    stages = simulate(config, Strategy("PPLL", "ppll", 4, num_stages=4), WORKLOAD)
    [whole] = simulate(config, Strategy("LoPT", "lopt", 4), WORKLOAD)
    assert len(stages) == 4
    assert sum(stage.parameters for stage in stages) == whole.parameters
    assert sum(stage.flops for stage in stages) == whole.flops
    assert max(stage.peak_bytes for stage in stages) < whole.peak_bytes


def test_stages_of_unequal_layers_share_the_model():
    """Four dense layers, then four of experts: the two stages between the first and the last are not alike."""
    special = {"num_hidden_layers": 8, "mlp_only_layers": [0, 1, 2, 3], "tie_word_embeddings": False}
    config, workload = tiny_config("qwen3_moe", **special), replace(WORKLOAD, dtype=torch.bfloat16)
    stages = simulate(config, Strategy("PPLL", "ppll", 4, num_stages=4), workload)
    [whole] = simulate(config, Strategy("LoPT", "lopt", 4), workload)
    assert stages[1].parameters < stages[2].parameters
    assert sum(stage.parameters for stage in stages) == whole.parameters


def test_stages_whose_layers_differ_in_their_configuration_alone():
    """With the same weights, layers without positions do less."""
    config = tiny_config("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 0, 1])
    stages = simulate(config, Strategy("PPLL", "ppll", 4, num_stages=4), WORKLOAD)
    assert stages[1].parameters == stages[2].parameters
    assert stages[1].moved_bytes > stages[2].moved_bytes


def test_links_hold_what_waits_in_the_queues_and_beside_them():
    """With a depth of 2, as the channels do: 4 messages at a sending end and 3 at a receiving one."""
    config = tiny_config(num_hidden_layers=8)
    stages = simulate(config, Strategy("PPLL", "ppll", 3, num_stages=3), WORKLOAD)
    message = BATCH * LENGTH * config.hidden_size * 4
    assert [stage.peak["communication"] for stage in stages] == [4 * message, 7 * message, 3 * message]


def test_local_step_frees_the_other_blocks_gradients():
    """And changes neither arithmetic, nor what is saved for backward, nor the optimizer's state."""
    config, workload = (
        tiny_config(num_hidden_layers=8, tie_word_embeddings=False),
        replace(WORKLOAD, optim="adamw_8bit"),
    )
    at_once, at_the_end = (
        simulate(config, Strategy("", method, 4), workload)[0] for method in ("lopt_local_step", "lopt")
    )
    assert at_once.gradient_bytes < 0.5 * at_the_end.gradient_bytes
    assert at_once.peak_bytes < at_the_end.peak_bytes
    assert at_once.peak["optimizer"] == at_the_end.peak["optimizer"]
    assert (at_once.flops, at_once.saved_bytes) == (at_the_end.flops, at_the_end.saved_bytes)


def test_local_step_under_accumulation():
    """Gradients that accumulate stay; the optimizer's work is done once, however many micro-batches there are."""
    at_once, at_the_end = (
        simulate(tiny_config(), Strategy("", method, 2), replace(WORKLOAD, accumulation_steps=6))[0]
        for method in ("lopt_local_step", "lopt")
    )
    assert at_once.gradient_bytes == at_the_end.gradient_bytes
    assert at_once.moved_bytes == pytest.approx(at_the_end.moved_bytes, rel=0.01)


def test_buckets_of_a_block_go_with_its_step():
    at_once, at_the_end = (
        simulate(tiny_config(num_hidden_layers=8), Strategy("", method, 4), replace(WORKLOAD, num_gpus=2))[0]
        for method in ("lopt_local_step", "lopt")
    )
    assert 0 < at_once.peak["communication"] < at_the_end.peak["communication"]


def test_weights_that_mlaan_adds():
    """Behind two of four layers: a copy of the last one, its average, a translator; norm and head, frozen."""
    config = tiny_config(num_hidden_layers=4, tie_word_embeddings=False)
    model = make_model("llama", num_hidden_layers=4, tie_word_embeddings=False)
    layer = sum(parameter.numel() for parameter in model.model.layers[-1].parameters())
    width, vocabulary = config.hidden_size, config.vocab_size
    translator, readout = width * (width + 1), width * (1 + vocabulary)
    [cost] = simulate(config, Strategy("MLAAN", "mlaan", 2), WORKLOAD)
    assert cost.trainable == model.num_parameters() + layer + translator
    assert cost.parameters == cost.trainable + layer + readout


def test_chunks_that_are_not_run_cost_what_others_do(monkeypatch):
    monkeypatch.setattr(mlaan_method, "MAX_LOGITS", 12 * len(VOCABULARY))  # of 62 tokens 12 at a time, the last time 2
    few = simulate(tiny_config(), Strategy("MLAAN", "mlaan", 2), WORKLOAD)
    monkeypatch.setattr(PlannedTokenLoss, "chunks", TokenLoss.chunks)
    assert simulate(tiny_config(), Strategy("MLAAN", "mlaan", 2), WORKLOAD) == few


def test_arithmetic_of_the_methods():
    """In units of a forward of all layers: 3 end to end, 4 with checkpointing, 3 for LoPT, 2 with freezing."""
    config = tiny_config(num_hidden_layers=8, hidden_size=64, intermediate_size=256)
    flops = {
        strategy.name: simulate(config, strategy, WORKLOAD)[0].flops
        for strategy in make_strategies(("e2e", "lopt", "freeze"), (2,), config)[0]
    }
    end_to_end = flops["end-to-end"]
    assert flops["end-to-end + checkpointing"] / end_to_end == pytest.approx(4 / 3, rel=0.05)
    assert flops["LoPT K=2"] / end_to_end == pytest.approx(1, rel=0.03)
    assert flops["freeze 1 of 2 blocks"] / end_to_end == pytest.approx(2 / 3, rel=0.05)


def test_a_gpu_needs_no_copies_of_the_tile_of_logits():
    end_to_end = Strategy("end-to-end", "e2e")
    gpu, cpu = (simulate(tiny_config(), end_to_end, WORKLOAD, on_gpu=on_gpu)[0] for on_gpu in (True, False))
    assert gpu.peak["logits"] < cpu.peak["logits"]
    assert gpu.flops == cpu.flops
    assert gpu.saved_bytes == cpu.saved_bytes


def test_memory_is_given_back():
    """No fake model outlives its simulation."""
    simulate(tiny_config(), Strategy("LoPT K=2", "lopt", 2), WORKLOAD)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Parameter) and thing.is_meta]


def test_default_strategies_of_a_small_model():
    config = tiny_config(num_hidden_layers=4)
    rows, left_out = make_strategies(DEFAULT_STRATEGIES, (2, 8), config, num_gpus=8)
    assert [row.name for row in rows[::2]] == [
        "end-to-end",
        "LoPT K=2",
        "LoPT K=2, local step",
        "K=2, reach 2,1,1,1",
        "MLAAN K=2, window 1",
        "freeze 1 of 2 blocks",
        "LoRA r=16",
        "PPLL on 4 devices",
    ]
    assert left_out == ["K=8: the model has 4 layers.", "RepL: the model has 4 layers."]
    assert all(row.checkpointing for row in rows[1::2])


def test_repl_is_left_out_where_it_does_not_support_the_family():
    rows, left_out = make_strategies(("repl",), (2,), tiny_config("falcon", num_hidden_layers=8))
    assert rows == [] and left_out[0].startswith("RepL: model_type='falcon' is not supported")
