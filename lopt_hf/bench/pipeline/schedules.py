"""End-to-end training by the schedules of `torch.distributed.pipelining`, on the stages that PPLL trains.

A plain loop: what the trainers do besides (metrics, callbacks) is left out, in favour of these schedules.

Shapes: B sequences of a micro-batch, T tokens, D hidden channels; the batch of a step has M micro-batches.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer

from lopt_hf.bench.pipeline.method_run import MethodRun, Record
from lopt_hf.bench.pipeline.settings import TWO_STAGES_PER_RANK
from lopt_hf.bench.pipeline.task import clip_groups
from lopt_hf.bench.pipeline.tasks import task_of
from lopt_hf.bench.pipeline.worker import make_plans, prepare
from lopt_hf.common.host_store import LOOPBACK
from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.pipeline.runtime.launch import choose_interface
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.pipeline.simulator.schedule_orders import stages_of
from lopt_hf.pipeline.simulator.torch_schedules import TORCH_SCHEDULES

__all__ = ["ScheduledTraining", "train_by_schedule"]


class _TimedStage(PipelineStage):
    """Notes when it computes; the rest of a schedule's step is waiting."""

    timeline: Timeline

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.timeline.span("forward"):
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.timeline.span("backward"):
            return super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.timeline.span("backward"):
            return super().backward_weight_one_chunk(*args, **kwargs)


def train_by_schedule(on_step: Callable[[], None], rank: int, run: MethodRun) -> Record:
    """Trains the stages of a rank by one of torch's schedules, with the optimizer and the batches of the trainers."""
    prepare(run.settings)
    store = dist.TCPStore(LOOPBACK, run.port, is_master=False)
    world_size = run.settings.stages
    choose_interface(LOOPBACK)
    dist.init_process_group("gloo", store=dist.PrefixStore(run.folder, store), rank=rank, world_size=world_size)
    training = ScheduledTraining(rank, run)
    record = Record()
    for step in range(run.total_steps):
        if step == run.settings.warmup - 1:
            with SavedBytes(training.modules) as saved:
                training.step(step, record)
            record.saved_bytes = saved.peak
        else:
            training.step(step, record)
        on_step()
    dist.barrier()
    dist.destroy_process_group()
    return record.finish(run, training.timeline)


class ScheduledTraining:
    """The training loop of a rank.

    Attributes:
        modules: The rank's stages.
        models: The parts of the model that they hold.
        timeline: When they compute.
    """

    def __init__(self, rank: int, run: MethodRun) -> None:
        settings = run.settings
        plans = make_plans(run, run.parts_at if run.method in TWO_STAGES_PER_RANK else run.split_at)
        indices = stages_of(run.method, rank, settings.stages)
        task = task_of(settings)
        self.models = [task.load_stage(run, plans[index]).train() for index in indices]
        self.modules = nn.ModuleList(
            task.make_stage(run, plans[index], model) for index, model in zip(indices, self.models, strict=True)
        )
        self.is_first, self.is_last = 0 in indices, len(plans) - 1 in indices
        self.timeline = Timeline(rank, kept_steps=run.total_steps)
        stages = [
            _TimedStage(module, index, len(plans), torch.device("cpu"))
            for index, module in zip(indices, self.modules, strict=True)
        ]
        for stage in stages:
            stage.timeline = self.timeline
        self.schedule = TORCH_SCHEDULES[run.method](
            stages if run.method in TWO_STAGES_PER_RANK else stages[0],
            n_microbatches=settings.microbatches,
            # Another rank's loss is not called; these schedules take it to tell that there is a backward.
            loss_fn=self.modules[indices.index(max(indices))].loss,
            scale_grads=False,  # the loss is divided by the tokens of the whole batch
        )
        args = task.make_config(run)
        self.max_grad_norm = args.max_grad_norm
        self.clip_groups = [group for model in self.models for group in clip_groups(model, run.parts_at)]
        optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(args)
        parameters = [parameter for group in self.clip_groups for parameter in group]
        self.optimizer = optimizer_class(parameters, weight_decay=args.weight_decay, **arguments)
        self.batches = task.make_batches(run)

    def step(self, step: int, record: Record) -> None:
        """One optimizer step of the rank's stages."""
        self.timeline.step = step
        with self.timeline.span("receive"):  # without the stages' own work in it
            losses = self.accumulate(step)
        with self.timeline.span("optimizer"):
            for group in self.clip_groups:
                clip_grad_norm_(group, self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        record.end_step()
        if losses:
            record.losses.append(torch.stack(losses).sum().item())

    def accumulate(self, step: int) -> list[torch.Tensor]:
        """Adds up the gradients of a step's micro-batches; returns their losses where the rank has the last stage."""
        inputs, target = self.batches[step]
        losses: list[torch.Tensor] = []
        args = tuple(inputs.values()) if self.is_first else ()
        last = {"target": target, "losses": losses} if self.is_last else {}
        self.schedule.step(*args, **inputs, **last, return_outputs=False)
        return losses
