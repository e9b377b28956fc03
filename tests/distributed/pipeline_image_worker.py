"""One stage of the runs of `test_pipeline_image.py`, one after the other in one world."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf.pipeline.runtime.image.config import ImagePipelineConfig
from lopt_hf.pipeline.runtime.image.trainer import ImageStageTrainer
from lopt_hf.pipeline.runtime.launch import PipelineWorld, Rendezvous, init_world
from tests.distributed.pipeline_fault_worker import become_rank
from tests.image.helpers import make_images, make_model, options


def run(world: PipelineWorld, output_dir: str, family: str, resume: str | None, settings: dict[str, Any]) -> None:
    args = ImagePipelineConfig(**options(output_dir, **settings))
    trainer = ImageStageTrainer(make_model(family), args, world=world, train_dataset=make_images(24))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if world.reports:
        Path(output_dir, "log_history.json").write_text(json.dumps(trainer.state.log_history))
    own = [name for name, _ in trainer.model.named_parameters()]
    Path(output_dir, f"parameters-{world.rank}.json").write_text(json.dumps(own))


def run_rank(rank: int, environment: dict[str, str], log: Path, arguments: Sequence[str], _: object) -> None:
    """What a launched process does, in a forked one."""
    become_rank(rank, environment, log)
    num_stages, data_parallel = int(arguments[0]), int(arguments[1])
    rendezvous = Rendezvous.from_environment()
    world = init_world(rendezvous, num_stages, data_parallel, "cpu", peer_timeout=60.0, sends_back=True)
    for line in Path(arguments[2]).read_text().splitlines():
        run(world, **json.loads(line))
    dist.barrier()
    world.monitor.finish()
    dist.destroy_process_group()
