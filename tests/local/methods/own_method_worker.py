"""One stage of the pipeline that trains by the method of `own_method.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lopt_hf.local.blocks import split_layers
from lopt_hf.pipeline.runtime.launch import Rendezvous, init_world
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from lopt_hf.pipeline.runtime.trainer import StageTrainer
from tests.distributed.pipeline_fault_worker import become_rank
from tests.local.methods.own_method import StayClosePipelineConfig
from tests.tiny import make_dataset, make_tokenizer
from tests.trainers.helpers import training_args


def make_settings() -> dict[str, Any]:
    return {"max_steps": 3, "num_blocks": 2, "closeness": 0.3, "max_grad_norm": 0.5}


def run_rank(rank: int, environment: dict[str, str], log: Path, arguments: Sequence[str], _: object) -> None:
    become_rank(rank, environment, log)
    world = init_world(Rendezvous.from_environment(), 2, 1, "cpu", peer_timeout=60.0)
    folder = Path(arguments[0])
    args: Any = StayClosePipelineConfig(**training_args(folder / "out", **make_settings()))
    plan = plan_stages(split_layers(4, 2), 2)[world.stage]
    model = StageTrainer.load_part(str(folder / "model"), plan, args, dtype="float32")
    given: dict[str, Any] = {"train_dataset": make_dataset(), "processing_class": make_tokenizer()}
    trainer = StageTrainer(model, args, world=world, **given)
    trainer.train()
    trainer.save_model()
    dist.barrier()
    world.monitor.finish()
    dist.destroy_process_group()
