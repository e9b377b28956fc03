"""One launch for all runs of two processes: importing torch and transformers takes longer than the runs."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.retention.small_tasks import write_tasks

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCH += ["--config_file", str(ROOT / "recipes/accelerate_configs/ddp_2.yaml"), "--main_process_port", "0"]


@dataclass(frozen=True)
class TwoProcesses:
    """What the launch left.

    Parameters:
        folder: With a folder for each run, and the retention tasks in `tasks`.
        return_code: Of the launcher.
        errors: The end of what the processes said.
    """

    folder: Path
    return_code: int
    errors: str

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """What a run ended with, which must be the same on both ranks."""
        files = [self.folder / name / f"weights-{rank}.safetensors" for rank in range(2)]
        assert all(file.exists() for file in files), f"{name} has not ended: {self.errors}"
        first, second = map(load_file, files)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        return first


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> TwoProcesses:
    """All of `ddp_worker.RUNS`; where one fails, the later ones are missing too."""
    folder = tmp_path_factory.mktemp("two-processes")
    write_tasks(folder / "tasks")
    command = [*LAUNCH, "-m", "tests.distributed.ddp_worker", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    return TwoProcesses(folder, result.returncode, result.stderr[-3000:])
