"""A process of one method in `lopt-hf bench pipeline`: the trainers, and what all methods have in common."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from lopt_hf.bench.pipeline_parts import Cut, divide_stages
from lopt_hf.bench.pipeline_settings import DELAYED, PPLL, PipelineBenchSettings
from lopt_hf.bench.processes import peak_resident_bytes
from lopt_hf.bench.training import SHARED_ARGUMENTS, silence, token_rows
from lopt_hf.common.host_store import LOOPBACK
from lopt_hf.local.blocks import find_decoder_stack, split_layers, untie_output_embeddings
from lopt_hf.local.ownership import parameters_by_block
from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.pipeline.runtime.config import PipelineConfig
from lopt_hf.pipeline.runtime.launch import PipelineWorld, Rendezvous, init_world
from lopt_hf.pipeline.runtime.stage import StagePlan, load_stage, plan_stages
from lopt_hf.pipeline.runtime.timeline import WAITS, Timeline
from lopt_hf.pipeline.runtime.trainer import PipelineTrainer
from lopt_hf.pipeline.split.balance import balanced_split, format_split
from lopt_hf.pipeline.split.costs import measure_costs
from lopt_hf.pipeline.split.stopwatch import PartCost
from lopt_hf.trainers.configs import LoPTConfig
from lopt_hf.trainers.sft import LoPTTrainer

__all__ = [
    "MethodRun",
    "Record",
    "clip_groups",
    "find_cut",
    "make_config",
    "make_plans",
    "make_rows",
    "prepare",
    "train",
]

PEER_TIMEOUT_SECONDS = 60.0  # importing torch in several processes on a busy machine takes a while


@dataclass(frozen=True)
class MethodRun:
    """What the processes of a method do in one round.

    Attributes:
        method: One of `METHODS`.
        settings: What is measured.
        checkpoint: The model's folder or hub id.
        cut: Where its stages and their parts begin. End-to-end methods clip each part apart.
        folder: Where a trainer may write.
        port: Of the store on this host through which the processes find each other.
    """

    method: str
    settings: PipelineBenchSettings
    checkpoint: str
    cut: Cut
    folder: str
    port: int

    @property
    def split_at(self) -> list[int]:
        """First layer of every stage but the first."""
        return self.cut.rerun_at if self.method == "ppll_delayed" else self.cut.split_at

    @property
    def parts_at(self) -> list[int]:
        """First layer of every part but the first."""
        return self.cut.parts_at

    @property
    def total_steps(self) -> int:
        """Of PPLL some more: while its last steps end, earlier stages are done and no longer share the machine."""
        settings = self.settings
        steps = settings.warmup + settings.steps
        if self.method not in PPLL:
            return steps
        ahead = (settings.stages - 1) * (2 * PipelineConfig.channel_depth + 2)  # micro-batches of the first stage
        return steps + -(-ahead // settings.microbatches)


@dataclass
class Record:
    """What one process measured.

    Attributes:
        ends: When each step ended, by `time.perf_counter`: one clock for all processes of a machine.
        losses: Task loss of each step in nats per token, where the process has it.
        saved_bytes: Peak bytes that autograd kept for backward, in the last step of the warm-up; where graphs are kept
            from step to step, they and their weights at the end of a step.
        queued_bytes: Most bytes that wait in the stage's channel to the next one.
        waiting: Share of the timed steps in which the stage waited for another; 0 in one process.
        cpu_seconds: CPU time of the process per timed step, all its threads.
        core_share: CPU time per second that it did not wait: below 1 by what other programs took.
        peak_resident_bytes: Peak resident memory of the process.
    """

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    queued_bytes: int = 0
    waiting: float = 0.0
    cpu_seconds: float = 0.0
    core_share: float = 0.0
    peak_resident_bytes: int = 0
    cpu_ends: list[float] = field(default_factory=list)

    def end_step(self) -> None:
        """Notes that a step ends now."""
        self.ends.append(perf_counter())
        self.cpu_ends.append(process_time())

    def finish(self, run: MethodRun, timeline: Timeline | None) -> "Record":
        """Sums up the timed steps."""
        before = run.settings.warmup - 1
        last = before + run.settings.steps
        seconds = self.ends[last] - self.ends[before]
        cpu_seconds = self.cpu_ends[last] - self.cpu_ends[before]
        events = [] if timeline is None else [event for event in timeline.events if before < event.step <= last]
        waited = sum(event.end - event.start for event in events if event.kind in WAITS)
        self.waiting = waited / seconds
        self.cpu_seconds = cpu_seconds / run.settings.steps
        self.core_share = cpu_seconds / (seconds - waited)
        self.peak_resident_bytes = peak_resident_bytes()
        return self


def prepare(settings: PipelineBenchSettings) -> None:
    """What every process does first."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL would report each trainer made here as a user's run
    silence()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)


def find_cut(on_step: Callable[[], None], checkpoint: str, settings: PipelineBenchSettings) -> Cut:
    """Measures where to cut, in as many processes at once as there are stages, sharing the machine as stages do."""
    prepare(settings)
    costs = measure_costs(
        checkpoint,
        settings.micro_batch_size,
        settings.seq_length,
        objective=settings.objective,
        autocast=torch.bfloat16 if settings.dtype == "bfloat16" else None,
        accumulation_steps=settings.microbatches,
    )
    split_at = balanced_split(costs, settings.stages, least_layers=settings.parts_per_stage)
    parts_at = divide_stages(split_at, len(costs.layers), settings.parts_per_stage, costs)
    twice = replace(costs, objective=PartCost(0.0, 0.0, 0), runs_again=True)  # no local objective
    return Cut(split_at, parts_at, balanced_split(twice, settings.stages), format_split(costs, split_at))


def train(on_step: Callable[[], None], rank: int, run: MethodRun) -> Record:
    """Trains by one of the package's or TRL's trainers."""
    prepare(run.settings)
    world = _init_world(rank, run) if run.method in PPLL else None
    trainer = _make_trainer(run, world)
    trainer.remove_callback(PrinterCallback)
    record = Record()
    trainer.add_callback(_StepRecorder(run, record, on_step))
    timeline = None
    if isinstance(trainer, PipelineTrainer):
        timeline = trainer.timeline = Timeline(rank, kept_steps=run.total_steps)
    trainer.train()
    if world is not None:
        record.queued_bytes = _most_queued_bytes(run, trainer.plan, trainer.stack.hidden_size)
        dist.barrier()
        world.monitor.finish()
        dist.destroy_process_group()
    return record.finish(run, timeline)


def _init_world(rank: int, run: MethodRun) -> PipelineWorld:
    store = dist.TCPStore(LOOPBACK, run.port, is_master=False)
    rendezvous = Rendezvous(dist.PrefixStore(run.folder, store), rank, run.settings.stages, rank)
    sends_back = run.method in DELAYED
    return init_world(rendezvous, run.settings.stages, 1, "cpu", PEER_TIMEOUT_SECONDS, sends_back=sends_back)


def _most_queued_bytes(run: MethodRun, plan: StagePlan, hidden_size: int) -> int:
    """All that may wait in a stage, in the channel to the next one and for gradients.

    A channel holds the queue, the message on its way, and the one that waits for a place. Where gradients are late,
    those of a step may be in the channel back, and behind the first stage inputs are kept until they come; a
    graph that is kept has them among what autograd saves.
    """
    settings = run.settings
    waiting = 0 if plan.is_last else PipelineConfig.channel_depth + 2
    if run.method in DELAYED and not plan.is_last:
        waiting += max(PipelineConfig.channel_depth, settings.microbatches) + 2
        keeps_inputs = run.method == "ppll_delayed" and not plan.is_first
        waiting += (plan.delay + 1) * settings.microbatches if keeps_inputs else 0
    values = settings.micro_batch_size * settings.seq_length * hidden_size
    return waiting * values * torch.finfo(torch.float32).bits // 8


def make_config(run: MethodRun) -> SFTConfig:
    """The training arguments of a method; all have the same batches, optimizer and clipping."""
    settings = run.settings
    shared: dict[str, Any] = {
        "output_dir": run.folder,
        "max_steps": run.total_steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.microbatches,
        "bf16": settings.dtype == "bfloat16",
        "use_cpu": True,
        "activation_checkpointing": False,
        "seed": settings.seed,
        **SHARED_ARGUMENTS,
    }
    local: dict[str, Any] = {
        "num_blocks": settings.stages,
        "split_at": run.split_at,
        "local_objective": settings.objective,
    }
    if run.method == "ppll":
        return PipelineConfig(**shared, **local, num_stages=settings.stages)
    if run.method in DELAYED:  # without a local objective
        delayed: dict[str, Any] = {"gradient": "delayed", "gradient_recompute": run.method == "ppll_delayed"}
        return PipelineConfig(**shared, **delayed, split_at=run.split_at, num_stages=settings.stages)
    return LoPTConfig(**shared, **local) if run.method == "lopt" else SFTConfig(**shared)


def make_rows(run: MethodRun, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of all steps, in their order."""
    settings = run.settings
    return token_rows(tokenizer, settings.batch_size * run.total_steps, settings.seq_length, settings.seed)


def _make_trainer(run: MethodRun, world: PipelineWorld | None) -> Any:
    args = make_config(run)
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoint)
    shared: dict[str, Any] = {
        "args": args,
        "train_dataset": Dataset.from_dict({"input_ids": make_rows(run, tokenizer)}),
        "processing_class": tokenizer,
    }
    if world is not None:
        plan = make_plans(run)[world.stage]
        keeps_readout = run.settings.objective == "readout" and run.method == "ppll"
        model = load_stage(run.checkpoint, plan, keeps_readout, dtype=torch.float32)
        return PipelineTrainer(model, world=world, **shared)
    model = AutoModelForCausalLM.from_pretrained(run.checkpoint, dtype=torch.float32)
    if run.method == "lopt":
        return LoPTTrainer(model, **shared)
    untie_output_embeddings(model)  # as on two stages of a pipeline
    return _EndToEndTrainer(model, parts_at=run.parts_at, **shared)


def make_plans(run: MethodRun, split_at: list[int] | None = None) -> list[StagePlan]:
    """Which layers each stage runs.

    Args:
        run: What is measured.
        split_at: First layer of every stage but the first. Default: that of the run.
    """
    split_at = run.split_at if split_at is None else split_at
    num_layers = AutoConfig.from_pretrained(run.checkpoint).get_text_config(decoder=True).num_hidden_layers
    return plan_stages(split_layers(num_layers, len(split_at) + 1, split_at), len(split_at) + 1)


def clip_groups(model: PreTrainedModel, parts_at: list[int]) -> list[list[torch.nn.Parameter]]:
    """The trainable parameters of each part of a model, or of a stage's part of one; parts it has nothing of are out.

    Args:
        model: The model, or what a stage holds of it.
        parts_at: First layer of every part but the first.
    """
    stack = find_decoder_stack(model)
    blocks = split_layers(len(stack.layers), len(parts_at) + 1, parts_at)
    parts = parameters_by_block(model, stack, blocks)
    groups = [[parameter for parameter in part.values() if parameter.requires_grad] for part in parts]
    return [group for group in groups if group]


class _EndToEndTrainer(SFTTrainer):
    """TRL's trainer; the gradient of each part of the model is clipped apart, as in all other methods."""

    def __init__(self, model: PreTrainedModel, parts_at: list[int], **kwargs: Any) -> None:
        self.groups = clip_groups(model, parts_at)
        super().__init__(model, **kwargs)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        norms = [clip_grad_norm_(group, self.args.max_grad_norm) for group in self.groups]
        return torch.linalg.vector_norm(torch.stack(norms))


class _StepRecorder(TrainerCallback):
    """Notes when each step ends, its loss, and in the last step of the warm-up the saved bytes."""

    def __init__(self, run: MethodRun, record: Record, on_step: Callable[[], None]) -> None:
        self.run, self.record, self.on_step = run, record, on_step
        self.saved: SavedBytes | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.run.settings.warmup - 1:
            weights = [weight for group in kwargs["optimizer"].param_groups for weight in group["params"]]
            self.saved = SavedBytes(chain(kwargs["model"].parameters(), kwargs["model"].buffers(), weights))
            self.saved.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.record.end_step()
        if self.saved is not None:
            self.saved.__exit__(None, None, None)
            self.record.saved_bytes, self.saved = max(self.record.saved_bytes, self.saved.peak), None
        control.should_log = True  # for the loss of this very step
        self.on_step()
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.record.losses.append(logs["loss"])
        if self.run.method == "ppll_delayed_graph":
            kept = [int(2**20 * mib) for name, mib in logs.items() if name.endswith("/kept_mib")]
            self.record.saved_bytes = max([self.record.saved_bytes, *kept])
