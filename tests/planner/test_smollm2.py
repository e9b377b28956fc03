"""The plan of a real model beside its real training step, and how long planning large models takes."""

import json
import subprocess
import sys
import time

import pytest
import torch

from lopt_hf.bench.step import StepBenchSettings, run_step_bench
from lopt_hf.planner.dimensions import load_config
from lopt_hf.planner.simulation import simulate
from lopt_hf.planner.step import Workload
from lopt_hf.planner.strategies import make_strategies
from lopt_hf.pretrained import SMOLLM2_ID

pytestmark = pytest.mark.slow

GIB = 2**30
NAMES = {  # of the benchmark's rows
    "end-to-end": "e2e",
    "end-to-end + checkpointing": "e2e + checkpointing",
    "LoPT K=2": "LoPT K=2",
    "LoPT K=4": "LoPT K=4",
    "freeze 1 of 2 blocks": "freeze",
    "LoRA r=16": "LoRA r=16",
}


def test_peak_of_saved_bytes_is_within_five_percent_of_the_measured():
    settings = StepBenchSettings(local_update_interval=(1,), steps=1, warmup=0)
    measured = {result.method: result.peak_saved_bytes for result in run_step_bench(settings, progress=False)}
    assert set(measured) == set(NAMES.values())
    config = load_config(SMOLLM2_ID)
    rows, _ = make_strategies(("e2e", "lopt", "freeze", "lora"), (2, 4), config)
    workload = Workload(settings.batch_size, settings.seq_length, torch.float32)
    for row in rows:
        if row.name in NAMES:
            [cost] = simulate(config, row, workload)
            assert cost.saved_bytes == pytest.approx(measured[NAMES[row.name]], rel=0.05), row.name


@pytest.mark.parametrize(
    ("model", "seconds"), [("Qwen/Qwen2.5-7B-Instruct", 120), ("meta-llama/Llama-3.1-70B-Instruct", 300)]
)
def test_large_models_are_planned_in_time(model, seconds, tmp_path):
    """All default rows, by the command, in less than 6 GiB; the time is that of an idle machine with two cores."""
    output = tmp_path / "plan.json"
    command = [sys.executable, "-m", "lopt_hf.cli", "plan", "--model", model, "--device-memory", "80GiB"]
    program = (
        "import json, resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime]))\n"
    )
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", program, *command, "--output", str(output)], capture_output=True, text=True, check=True
    )
    elapsed = time.perf_counter() - start
    peak, worked = json.loads(result.stdout)
    assert peak < 6 * GIB
    assert min(elapsed, worked) < seconds  # other work on the machine does not count
    assert len(json.loads(output.read_text())["rows"]) >= 14
