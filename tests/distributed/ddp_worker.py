"""One rank of a two-process run: launched by `test_ddp.py` with `accelerate launch`."""

import argparse
import json
import weakref
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf import RetentionCallback
from lopt_hf.distributed import end_training
from tests.mlaan.helpers import make_mlaan_trainer
from tests.tiny import make_dataset, make_questions
from tests.trainers.helpers import InTwoForwards, WithFixedCompletions, make_trainer, snapshot

# Whose completions do not depend on the number of processes
TRAINERS = {"grpo": WithFixedCompletions, "grpo-in-two-forwards": InTwoForwards}


def run(output_dir: Path, kind: str = "sft", **settings: Any) -> Any:
    """A run with the same micro-batches, however they are spread over processes and accumulation steps."""
    if "window" in settings:
        trainer = make_mlaan_trainer(output_dir, **settings)
    elif kind not in TRAINERS:
        trainer = make_trainer(output_dir, kind=kind, **settings)
    else:
        # Prompts of one length: which of them share a micro-batch is random, and must not matter.
        rows = make_questions().map(lambda row: {"prompt": f"{row['prompt'][:12]:12}"})
        kwargs = {"trainer_kwargs": {"train_dataset": rows}}
        trainer = make_trainer(output_dir, kind="grpo", trainer_class=TRAINERS[kind], **kwargs, **settings)
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--kind", default="sft")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--per_device_train_batch_size", type=int, default=2)
    parser.add_argument("--num_blocks", type=int, default=2)
    parser.add_argument("--local_backward", default="eager")
    parser.add_argument("--local_step", action="store_true")
    parser.add_argument("--local_objective", default="reconstruction")
    parser.add_argument("--load_best_model_at_end", action="store_true")
    parser.add_argument("--retention_tasks", type=Path, help="folder of tasks that a RetentionCallback measures")
    parser.add_argument("--window", type=int, default=argparse.SUPPRESS, help="MLAAN, with windows of so many blocks")
    options = vars(parser.parse_args())
    if "window" in options:
        del options["local_backward"], options["local_objective"], options["local_step"]
    tasks = options.pop("retention_tasks")
    if tasks is not None:
        callback = RetentionCallback(tasks=["tiny_sums", "tiny_text"], include_path=tasks, every_steps=2)
        options["trainer_kwargs"] = {"callbacks": [callback]}
    if options["load_best_model_at_end"]:
        # The first of three evaluations is the best: the rate is so high that the loss only rises.
        every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        options |= {**every_step, "learning_rate": 10.0, "trainer_kwargs": {"eval_dataset": make_dataset(8)}}
    trainer = run(**options)
    assert trainer.accelerator.num_processes == 2
    rank = trainer.accelerator.process_index
    save_file(snapshot(trainer), f"{trainer.args.output_dir}/weights-{rank}.safetensors")
    if rank == 0:
        Path(trainer.args.output_dir, "log_history.json").write_text(json.dumps(trainer.state.log_history))
    wrapped = weakref.ref(trainer.model_wrapped)
    assert isinstance(wrapped(), DistributedDataParallel)
    end_training(trainer)
    assert wrapped() is None


if __name__ == "__main__":
    main()
