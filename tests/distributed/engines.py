"""Runs on two gloo CPU processes under the engines that shard a model: FSDP and DeepSpeed.

On a machine without an accelerator accelerate falls back to DDP. `launch` starts a worker as a user would start a
training, with one of the recipes' configurations, and `use_real_engines`, which the worker calls before it makes any
arguments, lets accelerate take the path that it takes on GPUs.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

from tests.trainers.helpers import make_trainer

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]


def launch(config: str, worker: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs a worker, given as a module, on two processes with a configuration of `recipes/accelerate_configs`."""
    file = ROOT / f"recipes/accelerate_configs/{config}.yaml"
    command = [*LAUNCH, "--config_file", str(file), "-m", worker, *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, env=environment)


def use_real_engines() -> None:
    """Lets accelerate believe, in this process and from now on, that its CPU is one of several GPUs.

    It is told to stay off the CPU (`cpu=False`), to speak gloo, and to leave tensors where they are.
    """

    def prepare_backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    def init_partial(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
        stock_partial(self, cpu=False, **kwargs)

    def init_state(
        self: AcceleratorState, mixed_precision: str | None = None, cpu: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        stock_state(self, mixed_precision, False, *args, **kwargs)

    stock_partial, stock_state = PartialState.__init__, AcceleratorState.__init__
    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
    PartialState.__init__ = init_partial
    AcceleratorState.__init__ = init_state
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}  # its shared-memory collectives would be compiled first


def main() -> None:
    """Trains a tiny model for a step under the engine of the launch, and prints which shards it."""
    use_real_engines()
    trainer = make_trainer(Path(sys.argv[1]), max_steps=1, clip_scope="global")
    trainer.train()
    if trainer.accelerator.is_main_process:
        print(trainer.accelerator.distributed_type, type(next(trainer.model.parameters())).__name__)


if __name__ == "__main__":
    main()
