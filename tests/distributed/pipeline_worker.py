"""One stage of the runs of `test_pipeline.py`, one after the other in one world."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import LoraConfig, PeftConfig
from transformers import AutoConfig

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf.local.blocks import split_layers
from lopt_hf.pipeline.runtime.adapters import add_adapter
from lopt_hf.pipeline.runtime.config import MLAANPipelineConfig, PipelineConfig
from lopt_hf.pipeline.runtime.launch import PipelineWorld, Rendezvous, init_world
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from lopt_hf.pipeline.runtime.trainer import MLAANPipelineTrainer, PipelineTrainer
from tests.distributed.pipeline_fault_worker import become_rank
from tests.tiny import make_dataset, make_tokenizer
from tests.trainers.helpers import training_args


def make_lora(settings: bool | dict[str, Any] = True) -> PeftConfig:
    own = settings if isinstance(settings, dict) else {}
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **own)


def run(
    world: PipelineWorld, model: str, output_dir: str, lora: bool | dict, resume: str | bool | None, settings: dict
) -> None:
    streams = settings.pop("streams", False)
    is_mlaan = settings.pop("method", "lopt") == "mlaan"
    config_class, trainer_class = (
        (MLAANPipelineConfig, MLAANPipelineTrainer) if is_mlaan else (PipelineConfig, PipelineTrainer)
    )
    args: Any = config_class(**training_args(Path(output_dir), **settings))
    num_layers = AutoConfig.from_pretrained(model).get_text_config(decoder=True).num_hidden_layers
    plan = plan_stages(split_layers(num_layers, args.num_blocks, args.split_at), world.num_stages)[world.stage]
    stage = trainer_class.load_part(model, plan, args, dtype="float32")
    part = add_adapter(stage, make_lora(lora), args.seed) if lora else stage
    data = make_dataset().to_iterable_dataset(num_shards=2) if streams else make_dataset()
    trainer = trainer_class(part, args, world=world, train_dataset=data, processing_class=make_tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if world.reports:
        Path(output_dir, "log_history.json").write_text(json.dumps(trainer.state.log_history))


def main(arguments: Sequence[str]) -> None:
    num_stages, data_parallel = int(arguments[0]), int(arguments[1])
    rendezvous = Rendezvous.from_environment()
    world = init_world(rendezvous, num_stages, data_parallel, "cpu", peer_timeout=60.0, sends_back=True)
    for line in Path(arguments[2]).read_text().splitlines():
        run(world, **json.loads(line))
    dist.barrier()
    world.monitor.finish()
    dist.destroy_process_group()


def run_rank(rank: int, environment: dict[str, str], log: Path, arguments: Sequence[str], _: object) -> None:
    """What a launched process does, in a forked one."""
    become_rank(rank, environment, log)
    main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
