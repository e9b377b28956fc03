"""The joint local backward under FSDP2: sharded over two gloo processes, the gradients are the whole model's."""

import subprocess
import sys
from pathlib import Path


def test_joint_gradients_are_those_of_the_whole_model():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed.fsdp_worker"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("gradients agree") == 2
