"""A process of one method in `lopt-hf bench pipeline`: the trainers, and what all methods have in common."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from transformers import PrinterCallback, TrainerCallback

from lopt_hf.bench.pipeline.method_run import MethodRun, Record
from lopt_hf.bench.pipeline.parts import Cut, divide_stages
from lopt_hf.bench.pipeline.settings import DELAYED, PPLL, BenchSettings
from lopt_hf.bench.pipeline.tasks import task_of
from lopt_hf.bench.training import silence
from lopt_hf.common.host_store import LOOPBACK
from lopt_hf.local.blocks import split_layers
from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.pipeline.runtime.config import PipelineConfig
from lopt_hf.pipeline.runtime.launch import PipelineWorld, Rendezvous, init_world
from lopt_hf.pipeline.runtime.stage_plan import StagePlan, plan_stages
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.pipeline.split.balance import balanced_split, format_split

__all__ = ["find_cut", "make_plans", "prepare", "train"]

PEER_TIMEOUT_SECONDS = 60.0  # importing torch in several processes on a busy machine takes a while


def prepare(settings: BenchSettings) -> None:
    """What every process does first."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL would report each trainer made here as a user's run
    silence()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    task_of(settings).prepare(settings)


def find_cut(on_step: Callable[[], None], checkpoint: str, settings: BenchSettings) -> Cut:
    """Measures where to cut, in as many processes at once as there are stages, sharing the machine as stages do."""
    prepare(settings)
    costs = task_of(settings).measure_costs(settings, checkpoint)
    split_at = balanced_split(costs, settings.stages, least_layers=settings.parts_per_stage)
    parts_at = divide_stages(split_at, len(costs.layers), settings.parts_per_stage, costs)
    rerun_at = balanced_split(costs.with_gradient("delayed"), settings.stages)
    return Cut(split_at, parts_at, rerun_at, format_split(costs, split_at))


def train(on_step: Callable[[], None], rank: int, run: MethodRun) -> Record:
    """Trains by one of the package's or TRL's trainers."""
    prepare(run.settings)
    world = _init_world(rank, run) if run.method in PPLL else None
    plan = None if world is None else make_plans(run)[world.stage]
    trainer = task_of(run.settings).make_trainer(run, plan, world)
    trainer.remove_callback(PrinterCallback)
    record = Record()
    trainer.add_callback(_StepRecorder(run, rank, record, on_step))
    timeline = None
    if world is not None:
        timeline = trainer.timeline = Timeline(rank, kept_steps=run.total_steps)
    trainer.train()
    if world is not None and plan is not None:
        record.queued_bytes = _most_queued_bytes(run, plan)
        # The weights that are expected, while forwards run
        if run.method in DELAYED and trainer.args.weight_prediction and not plan.is_last:
            record.queued_bytes += sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
        dist.barrier()
        world.monitor.finish()
        dist.destroy_process_group()
    return record.finish(run, timeline)


def _init_world(rank: int, run: MethodRun) -> PipelineWorld:
    store = dist.TCPStore(LOOPBACK, run.port, is_master=False)
    rendezvous = Rendezvous(dist.PrefixStore(run.folder, store), rank, run.settings.stages, rank)
    sends_back = run.method in DELAYED
    return init_world(rendezvous, run.settings.stages, 1, "cpu", PEER_TIMEOUT_SECONDS, sends_back=sends_back)


def _most_queued_bytes(run: MethodRun, plan: StagePlan) -> int:
    """All that may wait in a stage, in the channel to the next one and for gradients.

    A channel holds the queue, the message on its way, and the one that waits for a place. Where gradients are late,
    those of a step may be in the channel back, and behind the first stage inputs are kept until they come; a
    graph that is kept has them among what autograd saves.
    """
    if plan.is_last:
        return 0
    settings, message_bytes = run.settings, task_of(run.settings).message_bytes
    waiting, kept = PipelineConfig.channel_depth + 2, 0
    if run.method in DELAYED:
        waiting += max(PipelineConfig.channel_depth, settings.microbatches) + 2
        keeps_inputs = run.method == "ppll_delayed" and not plan.is_first
        kept = (plan.delay + 1) * settings.microbatches if keeps_inputs else 0
    before = message_bytes(run, plan.start - 1) if kept else 0
    return waiting * message_bytes(run, plan.stop - 1) + kept * before


def make_plans(run: MethodRun, split_at: list[int] | None = None) -> list[StagePlan]:
    """Which layers each stage runs.

    Args:
        run: What is measured.
        split_at: First layer of every stage but the first. Default: that of the run.
    """
    split_at = run.split_at if split_at is None else split_at
    num_layers = task_of(run.settings).num_layers(run.settings, run.checkpoint)
    return plan_stages(split_layers(num_layers, len(split_at) + 1, split_at), len(split_at) + 1)


class _StepRecorder(TrainerCallback):
    """Notes when each step ends, its loss, and in the last step of the warm-up the saved bytes."""

    def __init__(self, run: MethodRun, rank: int, record: Record, on_step: Callable[[], None]) -> None:
        self.run, self.rank, self.record, self.on_step = run, rank, record, on_step
        self.saved: SavedBytes | None = None
        self.counting = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.run.settings.warmup - 1:
            counter = SavedBytes.of_training(kwargs["model"], kwargs["optimizer"])
            self.saved = self.counting.enter_context(counter)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.record.end_step()
        if self.saved is not None:
            self.counting.close()
            self.record.saved_bytes, self.saved = max(self.record.saved_bytes, self.saved.peak), None
        control.should_log = True  # for the loss of this very step
        self.on_step()
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.record.losses.append(logs["loss"])
        if self.run.method == "ppll_delayed_graph":
            kept = int(2**20 * logs.get(f"pipeline/stage_{self.rank}/kept_mib", 0))
            self.record.saved_bytes = max(self.record.saved_bytes, kept)
