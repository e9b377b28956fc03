"""One log of all stages: what each tells of itself, at the same step, in the record of the one that reports."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, set_seed

from lopt_hf.pipeline.events import Event, chrome_trace, plot_timeline
from lopt_hf.pipeline.runtime.stage_plan import StagePlan

__all__ = [
    "StageCallback",
    "add_figures",
    "add_final_figures",
    "collect_start_losses",
    "collect_timelines",
    "is_of_own_block",
    "share_logs",
    "write_timeline",
]

logger = logging.getLogger(__name__)


def add_figures(trainer: Any, logs: dict[str, float]) -> None:
    """Adds to a log of training this stage's figures and, on the process that reports, those of the others.

    They go through the rendezvous store, not the channels. The last stage waits for them: when it logs a step, the
    others are done with it or nearly so.

    Args:
        trainer: The stage's trainer.
        logs: What it is about to log.
    """
    if trainer.world.num_replicas > 1:
        _average_over_replicas(trainer, logs)
    logs.update(
        {f"pipeline/stage_{trainer.plan.index}/{name}": value for name, value in trainer.timeline.summary().items()}
    )
    if trainer.delayed is not None:
        logs[f"pipeline/stage_{trainer.plan.index}/kept_mib"] = trainer.delayed.kept_bytes / 2**20
    if trainer.world.reports:
        for stage in range(trainer.plan.index):
            key = _log_key(trainer, stage)
            logs.update(json.loads(trainer.world.monitor.wait_for(trainer.store, key)))
            trainer.store.delete_key(key)


def add_final_figures(trainer: Any, logs: dict[str, float]) -> None:
    """Makes the figures of a whole run those of all processes: each stock trainer has counted what its own has done.

    Args:
        trainer: The stage's trainer.
        logs: What it is about to log at the end.
    """
    world = trainer.world
    if world.num_replicas > 1:
        loss = torch.tensor(logs["train_loss"], dtype=torch.float64)
        dist.all_reduce(loss, group=world.data_group)
        logs["train_loss"] = loss.item() / world.num_replicas
        if trainer.args.max_steps > 0:  # of epochs it has taken all rows of the data set
            logs["train_samples_per_second"] *= world.num_replicas
    trainer.store.set(f"total_flos/{world.rank}", str(logs["total_flos"]))
    resumed = trainer._manifest
    if resumed is not None and len(resumed.stage_folders) != len(trainer.plans):
        del logs["total_flos"]  # several stages have begun with the count of one, or one with that of several
    elif world.reports:
        keys = [f"total_flos/{rank}" for rank in range(world.mesh.size())]
        logs["total_flos"] = sum(float(world.monitor.wait_for(trainer.store, key)) for key in keys)
        trainer.state.total_flos = logs["total_flos"]  # which is saved beside the model


def share_logs(trainer: Any, logs: Mapping[str, Any]) -> None:
    """Hands a stage's figures, at the step of the log, to the process that reports."""
    shared = {n: v for n, v in logs.items() if is_of_own_block(trainer.plan, n) or n.startswith("pipeline/")}
    if "grad_norm" in logs:
        shared[f"pipeline/stage_{trainer.plan.index}/grad_norm"] = logs["grad_norm"]
    trainer.store.set(_log_key(trainer, trainer.plan.index), json.dumps(shared))


def is_of_own_block(plan: StagePlan, name: str) -> bool:
    """Tells whether a logged figure is of one of a stage's blocks, such as `local_loss/block_0`."""
    kind, _, rest = name.partition("/")
    own = [f"block_{block.index}" for block in plan.blocks]
    return kind in ("local_loss", "drift") and rest.partition("/")[0] in own


def _log_key(trainer: Any, stage: int) -> str:
    return f"log/{trainer.state.global_step}/{stage}"


def _average_over_replicas(trainer: Any, logs: dict[str, float]) -> None:
    metrics = trainer._metrics["train"]
    names = sorted(metrics)
    means = [sum(metrics[name]) / len(metrics[name]) for name in names]
    values = torch.tensor([logs["loss"], *means], dtype=torch.float64)
    dist.all_reduce(values, group=trainer.world.data_group)
    totals = dict(zip(names, values[1:].tolist(), strict=True))
    logs["loss"] = values[0].item() / trainer.world.num_replicas
    for name, total in totals.items():
        metrics[name] = [total if name == "num_tokens" else total / trainer.world.num_replicas]


def collect_start_losses(trainer: Any) -> None:
    """Hands the losses before training to the process that reports, which logs them."""
    world = trainer.world
    store = world.new_run_store()
    if world.replica != 0:
        return
    store.set(str(trainer.plan.index), json.dumps(trainer.start_losses))
    if world.reports:
        for plan in trainer.plans:
            trainer.start_losses.update(json.loads(world.monitor.wait_for(store, str(plan.index))))


def collect_timelines(trainer: Any) -> None:
    """Hands what the stages recorded to the process that reports, which writes it as a picture and a trace."""
    if trainer.args.timeline_steps == 0 or trainer.world.replica != 0:
        return
    trainer.store.set(f"timeline/{trainer.plan.index}", json.dumps([vars(event) for event in trainer.timeline.events]))
    if not trainer.world.reports:
        return
    texts = [trainer.world.monitor.wait_for(trainer.store, f"timeline/{plan.index}") for plan in trainer.plans]
    events = [Event(**event) for text in texts for event in json.loads(text)]
    if events:  # none, if the run went on from a checkpoint behind the first steps
        title = f"{len(trainer.plans)} stages, first {trainer.args.timeline_steps} steps"
        write_timeline(title, events, Path(trainer.args.output_dir))


def write_timeline(title: str, events: Sequence[Event], output_dir: Path) -> None:
    """Writes events as `timeline.json`, a trace, and, if matplotlib is there, as the picture `timeline.png`."""
    origin = min(event.start for event in events)
    events = [replace(event, start=event.start - origin, end=event.end - origin) for event in events]
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "timeline.json").write_text(chrome_trace({title: events}), encoding="utf-8")
    try:
        plot_timeline({title: events}).savefig(output_dir / "timeline.png", dpi=150)
    except ImportError as error:  # the model has not been saved yet
        logger.warning("%s Of the timeline only %s is written.", error, output_dir / "timeline.json")


def _has_own_order(args: Any) -> bool:
    """Whether the order of the data is not drawn from the generators that dropout draws from."""
    if args.train_sampling_strategy == "random":
        return bool(args.accelerator_config.use_seedable_sampler)
    return bool(args.train_sampling_strategy != "group_by_length")


class StageCallback(TrainerCallback):
    """Seeds dropout by the stage, counts micro-batches, times the optimizer's step, and hands on the logs."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here and not before, since accelerate orders the data by the seed that the generator has when the data loader
        # is made. A run that goes on gets the random state of its checkpoint.
        if self.trainer.plan.index > 0 and state.global_step == 0 and _has_own_order(args):
            set_seed(args.seed + self.trainer.plan.index)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.plan.index > 0 and _has_own_order(args):
            set_seed(args.seed)  # which orders the data of the trainer's next run, on all stages alike

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.micro_batch = 0

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.micro_batch += 1

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.timeline.add("optimizer", self.started, time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:  # before the step is logged and saved
            self.trainer.drain()

    def on_log(self, *args: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs and not self.trainer.plan.is_last and self.trainer.world.replica == 0:
            share_logs(self.trainer, logs)
