"""One rank of the two-process runs that `conftest.py` launches, one after the other in one world."""

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from trl import SFTTrainer

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf import LoPTTrainer, RetentionCallback
from lopt_hf.common.distributed import end_training
from tests.image.helpers import make_local_trainer as make_image_trainer
from tests.local.methods.mlaan.helpers import make_mlaan_trainer
from tests.repl.helpers import make_repl
from tests.repl.test_training import make_trainer as make_repl_trainer
from tests.repl.test_training import snapshot as snapshot_of_model
from tests.tiny import make_dataset, make_questions
from tests.trainers.helpers import InTwoForwards, WithFixedCompletions, make_trainer, snapshot
from tests.trainers.test_vision import make_trainer as make_vision_trainer

# Whose completions do not depend on the number of processes
GRPO = {"grpo": WithFixedCompletions, "grpo-in-two-forwards": InTwoForwards}
REPL = {"repl-sft": SFTTrainer, "repl-lopt": LoPTTrainer}

REACH: dict[str, Any] = {"local_objective": "none", "num_blocks": 4, "task_reach": [2, 4, 1]}

# The runs that must end where one process with the same micro-batches does.
EQUAL_TO_ONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, accumulation": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "4 blocks": {"num_blocks": 4},
    "joint": {"local_backward": "joint"},
    # For which accelerate takes DDP on a machine without an accelerator
    "launched for FSDP": {"launched_for": "FSDP"},
    "readout": {"local_objective": "readout"},
    "dpo": {"kind": "dpo"},
    "grpo": {"kind": "grpo"},
    "grpo in two forwards": {"kind": "grpo-in-two-forwards"},
    # Windows of two blocks: the task's gradient reaches a block that DDP does not know of.
    "mlaan": {"window": 2, "num_blocks": 4},
    "mlaan, accumulation": {"window": 2, "num_blocks": 4, "gradient_accumulation_steps": 2},
    # The task's gradient reaches blocks that DDP does not know of, at some steps.
    "reach": {**REACH, "reach_rate": "sqrt"},
    "reach, accumulation": {**REACH, "gradient_accumulation_steps": 2},
    "reach, graphs kept": {**REACH, "reach_recompute": False},
    "reach, reconstruction": {**REACH, "local_objective": "reconstruction"},
    "reach, dpo": {**REACH, "kind": "dpo"},
    # Of each step's two micro-batches one has pictures: the first rank's
    "vision": {"kind": "vision", "train_vision": True},
    # Classifiers whose loss counts the step's images (ViT), and with batch norms and a mean (ResNet)
    "image, vit": {"kind": "image", "family": "vit"},
    "image, vit, readout": {"kind": "image", "family": "vit", "local_objective": "readout"},
    "image, resnet": {"kind": "image", "family": "resnet"},
    "image, resnet, reach": {"kind": "image", "family": "resnet", "local_objective": "none", "task_reach": [1, 3]},
    "image, resnet, mlaan": {"kind": "image", "family": "resnet", "window": 2},
    "RepL, sft": {"kind": "repl-sft"},
    "RepL, lopt": {"kind": "repl-lopt"},
}
BY_STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
OTHERS: dict[str, dict[str, Any]] = {
    "deferred step": {"gradient_accumulation_steps": 2, "num_blocks": 3},
    "reach, deferred step": REACH,
    "reach, local step": {**REACH, "local_step": True},
    "local step": {"gradient_accumulation_steps": 2, "num_blocks": 3, "local_step": True},
    "retention": {"retention": True},
    # The first of three evaluations is the best: the rate is so high that the loss only rises.
    "best model": {"load_best_model_at_end": True, "learning_rate": 10.0, **BY_STEPS},
}
RUNS = EQUAL_TO_ONE | OTHERS


def run(
    output_dir: Path, kind: str = "sft", launched_for: str | None = None, **settings: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A run with the same micro-batches, however they are spread over processes and accumulation steps."""
    if launched_for is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{launched_for.upper()}", "true")
            return run(output_dir, kind, **settings)
    settings = {"per_device_train_batch_size": 2, **settings}
    if kind in REPL:
        trainer = make_repl_trainer(REPL[kind], output_dir, make_repl(operator="branches"), **settings)
        trainer.train()
        return trainer, snapshot_of_model(trainer.model)
    if kind == "image":
        trainer = make_image_trainer(output_dir, **settings)
    elif kind == "vision":
        trainer = make_vision_trainer(output_dir, "llava", [1, 1, 0, 0] * 3, **settings)
    elif "window" in settings:
        trainer = make_mlaan_trainer(output_dir, **settings)
    elif kind in GRPO:
        # Prompts of one length: which of them share a micro-batch is random, and must not matter.
        rows = make_questions().map(lambda row: {"prompt": f"{row['prompt'][:12]:12}"})
        kwargs = {"trainer_kwargs": {"train_dataset": rows}}
        trainer = make_trainer(output_dir, kind="grpo", trainer_class=GRPO[kind], **kwargs, **settings)
    else:
        trainer = make_trainer(output_dir, kind=kind, **settings)
    trainer.train()
    return trainer, snapshot(trainer)


def given_to_the_trainer(settings: dict[str, Any], tasks: Path) -> dict[str, Any]:
    """With what cannot be written in `RUNS`."""
    if settings.pop("retention", False):
        callback = RetentionCallback(tasks=["tiny_sums", "tiny_text"], include_path=tasks, every_steps=2)
        settings["trainer_kwargs"] = {"callbacks": [callback]}
    if "eval_steps" in settings:
        settings["trainer_kwargs"] = {"eval_dataset": make_dataset(8)}
    return settings


def run_on_this_rank(output_dir: Path, settings: dict[str, Any], is_last: bool) -> None:
    trainer, weights = run(output_dir, **settings)
    assert trainer.accelerator.num_processes == 2
    rank = trainer.accelerator.process_index
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, output_dir / f"weights-{rank}.safetensors")
    if rank == 0:
        (output_dir / "log_history.json").write_text(json.dumps(trainer.state.log_history))
    wrapped = weakref.ref(trainer.model_wrapped)
    assert isinstance(wrapped(), DistributedDataParallel)
    if not is_last:
        trainer.end = lambda: None  # the other runs need the process group
    end_training(trainer)
    assert wrapped() is None


def main() -> None:
    folder = Path(sys.argv[1])
    gc.freeze()  # as in tests/conftest.py
    PartialState(cpu=True)
    for name, settings in RUNS.items():
        (folder / name).mkdir(exist_ok=True)
        given = given_to_the_trainer(dict(settings), folder / "tasks")
        run_on_this_rank(folder / name, given, is_last=name == list(RUNS)[-1])


if __name__ == "__main__":
    main()
