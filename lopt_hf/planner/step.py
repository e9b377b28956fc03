"""One optimizer step on one device, as the trainers' loop does it, with everything counted.

Shapes: B batch, T tokens, D hidden channels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from lopt_hf.common.distributed import GradientReducer
from lopt_hf.local.blocks import find_decoder_stack
from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.pipeline.runtime.stage import StagePlan
from lopt_hf.planner.memory import MemoryMeter, Work
from lopt_hf.planner.optimizers import DEFAULT_OPTIMIZER, make_optimizer
from lopt_hf.planner.setups import EndToEnd
from lopt_hf.trainers.local_step import stepping_only

__all__ = ["Step", "StepCost", "Workload"]

MAX_GRAD_NORM = 1.0  # transformers, TrainingArguments


@dataclass(frozen=True)
class Workload:
    """What a device does in a step.

    Attributes:
        batch_size: Sequences of a micro-batch.
        seq_length: Tokens of a sequence.
        dtype: Data type of the weights; with `torch.float32` the arithmetic is autocast to bf16.
        optim: One of `OPTIMIZERS`.
        lora_r: Rank of the adapters in the strategies that have them.
        num_gpus: Devices; more than one train data-parallel by DDP, or as stages of a pipeline.
        accumulation_steps: Micro-batches of an optimizer step.
        tied_embeddings: `"untie"` or `"freeze"`, see `LocalLearningArguments`.
        channel_depth: Hidden states that may wait at each end of a link of the pipeline, see `PipelineConfig`.
    """

    batch_size: int = 4
    seq_length: int = 1024
    dtype: torch.dtype = torch.bfloat16
    optim: str = DEFAULT_OPTIMIZER
    lora_r: int = 16
    num_gpus: int = 1
    accumulation_steps: int = 1
    tied_embeddings: str = "untie"
    channel_depth: int = 2

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step on one device."""
        return self.batch_size * self.seq_length * self.accumulation_steps


@dataclass(frozen=True)
class StepCost:
    """What one device needs for one optimizer step.

    Attributes:
        peak: Bytes alive at the peak, by category, see `memory.CATEGORIES`.
        gradient_bytes: Most bytes that parameters hold in `.grad` at a time, whenever that is, see `GradientBytes`.
        saved_bytes: Peak of the bytes that autograd keeps for backward, weights excluded, see `SavedBytes`; `None`
            with the form of checkpointing that it cannot see into.
        flops: Floating-point operations of matrix products and attention.
        moved_bytes: Bytes that all other operations read and write, the optimizer's included.
        parameters: Parameters on the device, heads included.
        trainable: Those that are trained.
    """

    peak: dict[str, int]
    gradient_bytes: int
    saved_bytes: int | None
    flops: int
    moved_bytes: int
    parameters: int
    trainable: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


class _LoneReducer(GradientReducer):
    """Makes the buckets that the trainers' reducer makes, and sends them nowhere."""

    def __init__(self, meter: MemoryMeter) -> None:
        super().__init__()
        self.meter = meter
        self.buckets: list[torch.Tensor] = []

    def start(self, parameters: Iterable[nn.Parameter]) -> None:
        with self.meter.region("communication"):
            for gradients in self._buckets(parameters):
                self.buckets.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))

    def wait(self) -> None:
        self.buckets.clear()


class Step:
    """Optimizer steps of one device.

    Args:
        setup: The model as its strategy trains it.
        workload: On how much data, with which optimizer.
        stage: The stage of a pipeline that the device runs, if it does.
    """

    def __init__(self, setup: EndToEnd, workload: Workload, stage: StagePlan | None) -> None:
        self.setup = setup
        self.workload = workload
        self.meter = MemoryMeter()
        self.optimizer = make_optimizer(workload.optim, setup.trainable, setup.model)
        self.reducer = _LoneReducer(self.meter) if workload.num_gpus > 1 and stage is None else None
        tokens_BT = torch.zeros(workload.batch_size, workload.seq_length, dtype=torch.long)
        self.inputs = {"input_ids": tokens_BT, "labels": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
        modules = nn.ModuleList([setup.model, setup.heads, setup.frozen])
        self.parameters = list(modules.parameters())
        self.weights = [*self.parameters, *modules.buffers()]
        self.meter.count(self.weights, "parameters")
        self.meter.follow_gradients(setup.trainable)
        self.buffers = self._make_buffers(stage)
        self.meter.count(self.buffers, "communication")

    def _make_buffers(self, stage: StagePlan | None) -> list[torch.Tensor]:
        """What communication holds all the time: DDP's buckets, or the hidden states in a pipeline's queues."""
        if stage is not None:
            links = int(not stage.is_first) + int(not stage.is_last)
            width = find_decoder_stack(self.setup.base).hidden_size
            messages = links * self.workload.channel_depth
            shape = (messages, self.workload.batch_size, self.workload.seq_length, width)
            return [torch.empty(shape, dtype=self.workload.dtype)]
        if self.reducer is None:
            return []
        seen = [p for group in self.setup.clip_groups[self.setup.early_groups :] for p in group if p.requires_grad]
        return [torch.empty_like(parameter) for parameter in seen]

    def run(self) -> None:
        """One optimizer step, as the trainers' loop does it."""
        micro_batches = min(2, self.workload.accumulation_steps)  # the third is as the second
        self.setup.heads.zero_grad()
        self.stepping = Work()
        for micro_batch in range(micro_batches):
            self.is_last_micro_batch = micro_batch == micro_batches - 1
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.setup.forward(self.inputs, self._finish_block)
            if loss is not None:
                loss.backward()
            del loss
            self.setup.finish()
        self.micro_batches_work = self.meter.work - self.stepping
        if self.reducer is not None:
            self.reducer.wait()
        for group in self.setup.clip_groups:
            clip_grad_norm_(group, MAX_GRAD_NORM)
        with self.meter.region("optimizer"):
            self.optimizer.step()
        self.setup.after_step()
        self.setup.model.zero_grad()

    def _finish_block(self, index: int) -> None:
        """What a trainer does with an early block whose gradients are there."""
        if not self.is_last_micro_batch:
            return
        if self.reducer is not None:
            self.reducer.start(self.setup.clip_groups[index])
        if self.setup.steps_early:
            before = self.meter.work
            self._step_block(self.setup.clip_groups[index])
            self.stepping += self.meter.work - before

    def _step_block(self, parameters: list[nn.Parameter]) -> None:
        """As `LocalStepMixin` does it."""
        if self.reducer is not None:
            self.reducer.wait()
        clip_grad_norm_(parameters, MAX_GRAD_NORM)
        with self.meter.region("optimizer"), stepping_only(self.optimizer, parameters):
            self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def measure(self) -> StepCost:
        """Runs a step and returns what it costs."""
        self.meter.reset_peak()
        with SavedBytes(self.weights) as saved:
            self.run()
        once, steps = self.micro_batches_work, self.workload.accumulation_steps
        further = (steps - min(2, steps)) / min(2, steps)  # micro-batches that were not run, per one that was
        return StepCost(
            peak=self.meter.peak,
            gradient_bytes=self.meter.gradient_peak,
            saved_bytes=saved.peak if self.setup.shows_saved_bytes else None,
            flops=round(self.meter.work.flops + further * once.flops),
            moved_bytes=round(self.meter.work.moved_bytes + further * once.moved_bytes),
            parameters=sum(parameter.numel() for parameter in self.parameters),
            trainable=sum(parameter.numel() for parameter in self.setup.trainable),
        )
