"""One optimizer step on one device, as the trainers' loop does it, with everything counted.

Shapes: B batch, T tokens, D hidden channels.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import nn

from lopt_hf.common.distributed import GradientReducer
from lopt_hf.local.learner import LearnerEvents
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.pipeline.runtime.arguments import PipelineArguments
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from lopt_hf.planner.memory import MemoryMeter, Work
from lopt_hf.planner.optimizers import DEFAULT_OPTIMIZER, make_optimizer
from lopt_hf.planner.setups import EndToEnd

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
        tied_embeddings: `"untie"` or `"freeze"`, see `LocalArguments`.
    """

    batch_size: int = 4
    seq_length: int = 1024
    dtype: torch.dtype = torch.bfloat16
    optim: str = DEFAULT_OPTIMIZER
    lora_r: int = 16
    num_gpus: int = 1
    accumulation_steps: int = 1
    tied_embeddings: str = "untie"

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step on one device."""
        return self.batch_size * self.seq_length * self.accumulation_steps


@dataclass(frozen=True)
class StepCost:
    """What one device needs for one optimizer step.

    Where the steps of a cycle differ, this is their mean, but for the peak, which is the highest of them.

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
        """Bytes at the peak, of all categories."""
        return sum(self.peak.values())

    @classmethod
    def over_cycle(cls, steps: Sequence["StepCost"]) -> "StepCost":
        """Returns what the steps of a cycle cost."""
        saved = [step.saved_bytes for step in steps if step.saved_bytes is not None]
        return replace(
            max(steps, key=lambda step: step.peak_bytes),
            gradient_bytes=round(fmean(step.gradient_bytes for step in steps)),
            saved_bytes=round(fmean(saved)) if saved else None,
            flops=round(fmean(step.flops for step in steps)),
            moved_bytes=round(fmean(step.moved_bytes for step in steps)),
        )


class _LoneReducer(GradientReducer):
    """Makes the buckets that the trainers' reducer makes, and sends them nowhere."""

    def __init__(self, meter: MemoryMeter) -> None:
        super().__init__()
        self.meter = meter
        self.buckets: list[torch.Tensor] = []

    def start(self, parameters: Iterable[nn.Parameter], may_differ: bool = False) -> None:
        with self.meter.region("communication"):
            for gradients in self._buckets(parameters):
                self.buckets.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))

    def wait(self) -> None:
        self.buckets.clear()


def _waiting_messages(stage: StagePlan) -> int:
    """The most hidden states that a stage's ends of its links hold.

    Beside the queue's, a sending end has one on its way and one that waits for a place; a receiving end, whose thread
    fetches ahead, has one that waits for a place.
    """
    depth = PipelineArguments.channel_depth
    return (depth + 2) * (not stage.is_last) + (depth + 1) * (not stage.is_first)


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
        self.reducer = _LoneReducer(self.meter) if workload.num_gpus > 1 and stage is None else None
        events = LearnerEvents(
            around_step=self._stepping_early,
            check_finite=lambda name, value: None,  # there are no values
            check_replay=lambda index, difference: None,
            optimizer=lambda: self.optimizer,
        )
        setup.begin(self.meter, events, self.reducer)
        self.trainable = setup.trainable
        self.optimizer = make_optimizer(workload.optim, self.trainable, setup.model)
        self._measure_steps_of(self.optimizer)
        tokens_BT = torch.zeros(workload.batch_size, workload.seq_length, dtype=torch.long)
        self.inputs = {"input_ids": tokens_BT, "labels": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
        modules = nn.ModuleList([setup.model, setup.heads, setup.frozen])
        self.parameters = list(modules.parameters())
        self.weights = [*self.parameters, *modules.buffers()]
        self.meter.count(self.weights, "parameters")
        self.meter.follow_gradients(self.trainable)
        self.buffers = self._make_buffers(stage)
        self.meter.count(self.buffers, "communication")
        setup.start(self.optimizer)
        self._step = 0

    def _make_buffers(self, stage: StagePlan | None) -> list[torch.Tensor]:
        """What communication holds all the time: DDP's buckets, or the hidden states in a pipeline's queues."""
        if stage is not None:
            width = find_decoder_stack(self.setup.base).hidden_size
            messages = _waiting_messages(stage)
            shape = (messages, self.workload.batch_size, self.workload.seq_length, width)
            return [torch.empty(shape, dtype=self.workload.dtype)]
        if self.reducer is None:
            return []
        return [torch.empty_like(parameter) for parameter in self.setup.seen_by_ddp if parameter.requires_grad]

    def _measure_steps_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts what the optimizer's steps hold as its own."""
        region = contextlib.ExitStack()
        optimizer.register_step_pre_hook(lambda *_: region.enter_context(self.meter.region("optimizer")))
        optimizer.register_step_post_hook(lambda *_: region.close())

    @contextlib.contextmanager
    def _stepping_early(self) -> Iterator[None]:
        """Counts the work of an early block's step apart from that of its micro-batch."""
        before = self.meter.work
        yield
        self.stepping += self.meter.work - before

    def run(self) -> None:
        """The next optimizer step, as the trainers' loop does it."""
        micro_batches = min(2, self.workload.accumulation_steps)  # the third is as the second
        self.setup.heads.zero_grad()
        self.stepping = Work()
        self.setup.begin_step(self.optimizer, self._step)
        for micro_batch in range(micro_batches):
            synchronises = micro_batch == micro_batches - 1
            with self.setup.micro_batch(synchronises):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = self.setup.forward(self.inputs, self._step, synchronises)
                if loss is not None:
                    loss.backward()
                del loss
                self.setup.finish()
        self.micro_batches_work = self.meter.work - self.stepping
        self.setup.clip(MAX_GRAD_NORM)
        self.optimizer.step()
        self.setup.after_step()
        self.setup.model.zero_grad()
        self._step += 1

    def measure(self) -> StepCost:
        """Runs a cycle twice, and returns what the steps cost the second time, when the optimizer has its state."""
        for _ in range(self.setup.cycle):
            self.run()
        return StepCost.over_cycle([self._measure_one() for _ in range(self.setup.cycle)])

    def _measure_one(self) -> StepCost:
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
            trainable=sum(parameter.numel() for parameter in self.trainable),
        )
