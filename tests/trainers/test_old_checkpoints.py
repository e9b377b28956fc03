"""Checkpoints that the version before `LocalLearner` wrote go on under today's as if nothing had changed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.resume_before_local_learner.make import LAST_STEP, RUNS, SAVED_STEP, train

FIXTURE = Path(__file__).parents[1] / "fixtures/resume_before_local_learner"
# The first three steps were computed elsewhere: sums in another order differ in a float's last bits, which Adam's
# division lets grow. On the machine that wrote the checkpoints all is equal bit by bit, and with kernels for another
# processor (ATEN_CPU_CAPABILITY=default) within these; a lost momentum or changed heads move weights by 5e-3 or more.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}
TOLERANCE_BETWEEN_MACHINES = {"rtol": 1e-3, "atol": 2e-5}  # all six steps differ, not three


def read_weights(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    files = sorted(folder.glob(pattern))
    return {f"{file.parent.relative_to(folder)}/{key}": t for file in files for key, t in load_file(file).items()}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("run", RUNS)
def test_an_old_checkpoint_resumes(tmp_path, run):
    """With model, local heads and optimizer state as after an uninterrupted run of today's code."""
    start, whole, resumed = FIXTURE / "start", tmp_path / "whole" / run, tmp_path / "resumed" / run
    train(run, start, whole)
    shutil.copytree(FIXTURE / run / f"checkpoint-{SAVED_STEP}", resumed / f"checkpoint-{SAVED_STEP}")
    train(run, start, resumed, resume=True)
    last = f"checkpoint-{LAST_STEP}"
    everything = "**/*.safetensors"
    assert_close(read_weights(resumed / last, everything), read_weights(whole / last, everything), **TOLERANCE)
    assert_close(read_weights(resumed), read_weights(FIXTURE / run / "final"), **TOLERANCE_BETWEEN_MACHINES)
