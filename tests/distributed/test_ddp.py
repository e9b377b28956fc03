"""Two gloo processes end where one process with the same global batch does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lopt_hf.distributed import GradientReducer, ignored_by_ddp
from tests.distributed.ddp_worker import run
from tests.trainers.helpers import snapshot

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ROOT / "recipes/accelerate_configs/ddp_2.yaml"


def launch(output_dir: Path, *options: object) -> dict[str, torch.Tensor]:
    """Runs two ranks and returns their weights, which must be the same."""
    output_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_PROCESSES)]
    command += ["--main_process_port", "0"]
    command += ["-m", "tests.distributed.ddp_worker", str(output_dir), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (load_file(output_dir / f"weights-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    return first


def assert_same_weights(two: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> None:
    assert two.keys() == one.keys()
    worst = {name: ((two[name] - weight).norm() / weight.norm()).item() for name, weight in one.items()}
    assert max(worst.values()) <= 1e-6, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_processes_equal_one(tmp_path, checkpointing, accumulation):
    """The same micro-batches, half of them on each rank."""
    options = ["--gradient_accumulation_steps", accumulation]
    two = launch(tmp_path / "two", *options, *(["--gradient_checkpointing"] if checkpointing else []))
    one = run(
        tmp_path / "one",
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=2 * accumulation,
        per_device_train_batch_size=2,
    )
    assert_same_weights(two, snapshot(one))


@pytest.mark.parametrize(
    "options",
    [
        ("--num_blocks", 4),
        ("--local_backward", "joint"),
        ("--local_objective", "readout"),
        ("--kind", "dpo"),
        ("--kind", "grpo"),
        ("--kind", "grpo-in-two-forwards"),
    ],
    ids=lambda options: "{} {}".format(*options),
)
def test_two_processes_equal_one_with_other_settings(tmp_path, options):
    two = launch(tmp_path / "two", *options)
    name, value = options
    settings = {name.lstrip("-"): value, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    assert_same_weights(two, snapshot(run(tmp_path / "one", **settings)))


def test_local_step_changes_no_bit(tmp_path):
    options = ["--gradient_accumulation_steps", 2, "--num_blocks", 3]
    local, deferred = launch(tmp_path / "local", *options, "--local_step"), launch(tmp_path / "deferred", *options)
    assert all(torch.equal(local[name], deferred[name]) for name in deferred)
    logs = [json.loads((tmp_path / name / "log_history.json").read_text()) for name in ("local", "deferred")]
    norms = [[record["grad_norm"] for record in log if "grad_norm" in record] for log in logs]
    assert norms[0] == norms[1] and len(norms[0]) == 3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_of_mlaan_equal_one(tmp_path, accumulation):
    """Windows of two blocks: the task's gradient reaches a block that DDP does not know of."""
    options = ["--window", 2, "--num_blocks", 4, "--gradient_accumulation_steps", accumulation]
    two = launch(tmp_path / "two", *options)
    settings = {"gradient_accumulation_steps": 2 * accumulation, "per_device_train_batch_size": 2}
    assert_same_weights(two, snapshot(run(tmp_path / "one", window=2, num_blocks=4, **settings)))


def test_both_ranks_load_the_best_model(tmp_path):
    weights = launch(tmp_path, "--load_best_model_at_end")
    best = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best).parent == tmp_path and Path(best).name != "checkpoint-3"
    saved = load_file(Path(best) / "model.safetensors")
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def test_the_marks_for_ddp_are_taken_off_again():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with ignored_by_ddp(model, ["0.weight"]):
        assert model._ddp_params_and_buffers_to_ignore == ["0.weight"]
    assert not model._ddp_params_and_buffers_to_ignore
    assert not any(vars(parameter).get("_ddp_ignored") for parameter in model.parameters())


def test_buckets_hold_every_gradient_once():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 5, 2, 7)]
    for parameter in parameters[:3]:
        parameter.grad = torch.ones_like(parameter)
    buckets = list(GradientReducer(bucket_bytes=4 * 6)._buckets(parameters))
    assert [[g.numel() for g in bucket] for bucket in buckets] == [[2, 5], [3]]
