"""Delayed gradients over checkpoints, killed stages, replicas, and stages of different speed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lopt_hf.pipeline.runtime.export import export_checkpoint
from tests.distributed.pipeline_fault_worker import Fault
from tests.distributed.pipeline_processes import (
    arguments,
    assert_same_model,
    assert_succeeded,
    checkpoints,
    run,
    two_hosts,
    write_inputs,
)
from tests.distributed.test_pipeline import assert_equal, load_model, run_pipeline
from tests.distributed.test_pipeline_delayed import run_one_process
from tests.distributed.test_pipeline_faults import launch_on

LAYER = "transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward"
MESSAGE = "lopt_hf.pipeline.runtime.channel._Message"
DELAYED = {"gradient": "delayed", "activation_checkpointing": False}
# Three micro-batches to a step, and saved at every step
SETTINGS = {**DELAYED, "gradient_accumulation_steps": 3, "max_steps": 6, "save_steps": 1, "save_total_limit": 10}
WAYS: dict[str, dict[str, Any]] = {
    "recomputed": SETTINGS,
    "kept": {**SETTINGS, "gradient_recompute": False, "use_peft": True, "lora_r": 4},
    "both": {**SETTINGS, "gradient": "local_and_delayed", "num_blocks": 2},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_stage_and_the_run_that_goes_on(tmp_path, inputs, way):
    """Killed in the backward of a late gradient; what was on its way is in the checkpoint."""
    settings = WAYS[way]
    ranks = settings.get("num_blocks", 3)
    codes, outputs = run(inputs, tmp_path / "reference", ranks=ranks, **settings)
    assert_succeeded(codes, outputs)
    says_rates = "rise to the whole of it in 3 steps, all higher by" in outputs[-1]
    assert says_rates == (way != "both")
    # The last stage has no delayed backward; the first of three begins at the third step.
    fault = Fault("torch.autograd.backward", 8, ranks=(0,))
    codes, _ = run(inputs, tmp_path / "out", ranks=ranks, faults=[fault], timeout=30, **settings)
    assert codes[0] == -9 and 0 not in codes
    assert "checkpoint-6" not in checkpoints(tmp_path / "out") and checkpoints(tmp_path / "out")
    resumed = run(inputs, tmp_path / "out", ranks=ranks, resume_from_checkpoint="auto", **settings)
    assert_succeeded(*resumed)
    if way == "kept":
        assert_equal(load_model(tmp_path / "out"), load_model(tmp_path / "reference"))
        return
    assert_same_model(tmp_path / "out", tmp_path / "reference")
    # The last checkpoint is drained: it is what the run ended with.
    export_checkpoint(tmp_path / "out/checkpoint-6", tmp_path / "model")
    assert_equal(load_model(tmp_path / "model"), load_model(tmp_path / "out"))


def test_gradients_on_their_way_need_the_same_stages(tmp_path, inputs):
    settings = {**SETTINGS, "max_steps": 2}
    assert_succeeded(*run(inputs, tmp_path / "out", **settings))
    other: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_blocks": 2}, "was trained with num_stages=3, but this run has num_stages=2"),
        ({"gradient": "local"}, "was trained with gradient=delayed, but this run has gradient=local"),
        ({"gradient_recompute": False}, "was trained with gradient_recompute=True, but this run has"),
    )
    for change, message in other:
        ranks = change.get("num_blocks", 3)
        again = {**settings, "max_steps": 4, "resume_from_checkpoint": "auto", **change}
        codes, outputs = run(inputs, tmp_path / "out", ranks=ranks, timeout=30, **again)
        assert 0 not in codes and message in outputs[0], outputs[0][-2000:]


def test_replicas_equal_one_process_with_the_same_global_batch(tmp_path):
    """Also in what balances the experts, which is a mean of each micro-batch."""
    settings = {**DELAYED, "num_blocks": 2, "per_device_train_batch_size": 2, "max_steps": 5}
    settings |= {"family": "qwen3_moe", "router_aux_loss_coef": 0.5}
    run_pipeline(tmp_path, 2, {"replicas": {**settings, "data_parallel": 2}}, data_parallel=2)
    one = run_one_process(tmp_path, tmp_path / "one", {**settings, "gradient_accumulation_steps": 2})
    two = load_model(tmp_path / "replicas")
    worst = max(((two[name] - weight).norm() / weight.norm()).item() for name, weight in one.items())
    assert worst <= 1e-6


def test_replicas_go_on(tmp_path):
    """Each has had other micro-batches on their way, or with dropout on a stream other random numbers."""
    shared = {"num_blocks": 2, "data_parallel": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    saves = {**DELAYED, **shared}
    stream = {"gradient": "local", "streams": True, "lora": {"lora_dropout": 0.5}, **shared}
    runs = {"saves": saves, "resumed": {**saves, "resume": "saves/checkpoint-2"}}
    runs |= {"stream": stream, "stream, resumed": {**stream, "resume": "stream/checkpoint-2"}}
    run_pipeline(tmp_path, 2, runs, data_parallel=2)
    assert_equal(load_model(tmp_path / "resumed"), load_model(tmp_path / "saves"))
    assert_equal(load_model(tmp_path / "stream, resumed"), load_model(tmp_path / "stream"))
    states = [
        torch.load(tmp_path / f"saves/checkpoint-2/in-flight/stage-0-{i}.pt", weights_only=True) for i in range(2)
    ]
    (first, second) = (state["steps"][0][0]["arguments"]["input_ids"] for state in states)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_two_hosts_are_as_one(tmp_path, inputs):
    """Network namespaces, between which hidden states go one way and cotangents the other."""
    settings = {**SETTINGS, "num_blocks": 2}
    assert_succeeded(*run(inputs, tmp_path / "one-host", ranks=2, **settings))
    try:
        with two_hosts() as (*hosts, _):
            launchers = launch_on(hosts, tmp_path, arguments(inputs, tmp_path / "out", **settings))
            assert [launcher.wait(120) for launcher in launchers] == [0, 0], (tmp_path / "host-0").read_text()[-3000:]
    except PermissionError as error:
        pytest.skip(f"cannot make network namespaces here: {error}")
    assert_same_model(tmp_path / "out", tmp_path / "one-host")


def messages_and_memory(text: str) -> list[tuple[int, int]]:
    """What `note_memory` has printed: messages alive, and resident bytes."""
    notes = [line.split()[-2:] for line in text.splitlines() if "memory: " in line]
    return [(int(alive), int(resident)) for alive, resident in notes]


@pytest.mark.parametrize("slow", [0, 2])
def test_what_is_on_its_way_is_bounded(tmp_path, inputs, slow):
    """Whichever stage is slow, and with more micro-batches than the channels hold no stage waits for ever."""
    faults = [Fault(MESSAGE, 0, "note_memory", after=True), Fault(LAYER, 0, "slow_down", ranks=(slow,))]
    settings = {**DELAYED, "max_steps": 6, "gradient_accumulation_steps": 8, "save_strategy": "no", "channel_depth": 1}
    codes, outputs = run(inputs, tmp_path / "out", faults=faults, **settings)
    assert_succeeded(codes, outputs)
    for rank, text in enumerate(outputs):
        notes = messages_and_memory(text)
        ends = 4 if rank == 1 else 2
        assert len(notes) == ends * 48
        # Per end: what waits, what is on its way, and what is about to wait or has just been taken; where cotangents
        # arrive those of a step wait.
        assert max(alive for alive, _ in notes) <= ends * (1 + 2) + 7 * (rank < 2), rank


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_memory_stays_over_many_steps_with_a_slow_stage(tmp_path, inputs, recompute):
    """500 steps; `docs/ppll.md` names what is kept."""
    faults = [Fault(MESSAGE, 0, "note_memory", after=True), Fault(LAYER, 0, "slow_down", ranks=(2,))]
    settings = {**DELAYED, "max_steps": 500, "save_strategy": "no", "per_device_train_batch_size": 16}
    given = {"logging_steps": 100, "gradient_recompute": recompute, "timeout": 560}
    codes, outputs = run(inputs, tmp_path / "out", faults=faults, **settings, **given)
    assert_succeeded(codes, outputs)
    for rank, text in enumerate(outputs):
        notes = messages_and_memory(text)
        grown = notes[-1][1] - notes[len(notes) // 5][1]
        most = max(alive for alive, _ in notes)
        print(f"rank {rank}: {most} alive, {notes[-1][1] / 2**20:.0f} MiB, grown {grown / 2**20:.2f}")
        assert most <= (4 if rank == 1 else 2) * (2 + 2) and grown < 2 * 2**20, rank
