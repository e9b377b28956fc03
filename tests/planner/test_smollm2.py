"""The plan of a real model beside its real training step, and the memory that planning large models takes."""

import json
import subprocess
import sys

import pytest
import torch

from lopt_hf.bench.step import StepBenchSettings, run_step_bench
from lopt_hf.bench.step_settings import METHODS
from lopt_hf.data.pretrained import SMOLLM2_ID
from lopt_hf.planner.dimensions import load_config
from lopt_hf.planner.simulation import simulate
from lopt_hf.planner.step import Workload
from lopt_hf.planner.strategies import make_strategies

pytestmark = pytest.mark.slow

GIB = 2**30
NAMES = {  # of the benchmark's rows
    "end-to-end": "e2e",
    "end-to-end + checkpointing": "e2e + checkpointing",
    "LoPT K=2": "LoPT K=2",
    "LoPT K=4": "LoPT K=4",
    "LoPT K=2, local step": "LoPT K=2, local step",
    "LoPT K=4, local step": "LoPT K=4, local step",
    "MLAAN K=2, window 1": "MLAAN K=2, window 1",
    "MLAAN K=4, window 2": "MLAAN K=4, window 2",
    "freeze 1 of 2 blocks": "freeze",
    "LoRA r=16": "LoRA r=16",
}


def test_saved_bytes_and_gradients_are_within_five_percent_of_the_measured():
    settings = StepBenchSettings(
        methods=(*METHODS, "mlaan"), local_update_interval=(1,), steps=1, warmup=0, dtype="bfloat16"
    )
    measured = {result.method: result for result in run_step_bench(settings, progress=False)}
    assert set(NAMES.values()) <= set(measured)
    config = load_config(SMOLLM2_ID)
    rows, _ = make_strategies(("e2e", "lopt", "lopt_local_step", "mlaan", "freeze", "lora"), (2, 4), config)
    workload = Workload(settings.batch_size, settings.seq_length, torch.float32)
    for row in rows:
        if row.name in NAMES:
            [cost] = simulate(config, row, workload)
            result = measured[NAMES[row.name]]
            assert cost.saved_bytes == pytest.approx(result.peak_saved_bytes, rel=0.05), row.name
            assert cost.gradient_bytes == pytest.approx(result.peak_gradient_bytes, rel=0.05), row.name


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-70B-Instruct"])
def test_large_models_are_planned_in_little_memory(model, tmp_path):
    """All default rows, by the command, in less than 6 GiB."""
    output = tmp_path / "plan.json"
    command = [sys.executable, "-m", "lopt_hf.cli", "plan", "--model", model, "--device-memory", "80GiB"]
    program = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *command, "--output", str(output)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 6 * GIB
    assert len(json.loads(output.read_text())["rows"]) == 26
