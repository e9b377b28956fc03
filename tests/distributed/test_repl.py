"""A RepL model trained on two processes ends where it does on one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.repl_worker import run

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ROOT / "recipes/accelerate_configs/ddp_2.yaml"


@pytest.mark.parametrize("kind", ["sft", "lopt"])
def test_two_processes_equal_one(kind, tmp_path):
    output_dir = tmp_path / "two"
    output_dir.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_PROCESSES)]
    command += ["--main_process_port", "0", "-m", "tests.distributed.repl_worker", str(output_dir), kind]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (load_file(output_dir / f"weights-{rank}.safetensors") for rank in range(2))
    one = run(tmp_path / "one", kind, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for name, weight in one.items():
        assert torch.equal(first[name], second[name])
        assert (first[name] - weight).norm() <= 1e-6 * weight.norm(), name
