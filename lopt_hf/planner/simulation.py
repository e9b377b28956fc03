"""Two training steps of a real model class on fake tensors: nothing is allocated, everything is counted.

The model is built from its configuration, gets adapters, surrogates, heads and the gradient boundary by the package's
own code, and does what the trainers do in a step. The second step is what counts: the optimizer has its state by then.

What is assumed: no token is padding, every token has a label, and attention runs in torch's scaled-dot-product kernel
of the flash kind, which keeps queries, keys, values, output and one number for each token and head.

Shapes: B batch, T tokens, D hidden channels.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lopt_hf.bench.saved_bytes import SavedBytes
from lopt_hf.blocks import find_decoder_stack, split_layers
from lopt_hf.distributed import GradientReducer
from lopt_hf.pipeline.stage import StagePlan, plan_stages
from lopt_hf.planner.memory import MemoryMeter
from lopt_hf.planner.optimizers import DEFAULT_OPTIMIZER, make_optimizer
from lopt_hf.planner.setups import EndToEnd, make_setup
from lopt_hf.planner.strategies import Strategy
from lopt_hf.planner.task_loss import loss_as_on_gpu, metered_loss

__all__ = ["StepCost", "Workload", "simulate"]

UNPADDED = "lopt_hf_unpadded_sdpa"


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
        saved_bytes: Peak of the bytes that autograd keeps for backward, weights excluded, see `SavedBytes`.
        flops: Floating-point operations of matrix products and attention.
        moved_bytes: Bytes that all other operations read and write, the optimizer's included.
        parameters: Parameters on the device, heads included.
        trainable: Those that are trained.
    """

    peak: dict[str, int]
    saved_bytes: int
    flops: int
    moved_bytes: int
    parameters: int
    trainable: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


def simulate(
    config: PretrainedConfig, strategy: Strategy, workload: Workload, on_gpu: bool = True
) -> list[StepCost]:
    """Simulates two steps of a strategy and returns what the second one costs.

    Args:
        config: Configuration of a causal language model; it is not changed.
        strategy: What to simulate.
        workload: On how much data, with which optimizer.
        on_gpu: Let the loss need what it needs on a GPU; `False`: what it needs on a CPU.

    Returns:
        The cost of each stage of a pipeline; one cost without a pipeline.

    Raises:
        ValueError: If the model is no decoder-only language model, or cannot be simulated.
    """
    stages = _stages(strategy, config.get_text_config(decoder=True).num_hidden_layers)
    costs: dict[Any, StepCost] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a run, and there is none
        for kind, stage in stages:
            if kind not in costs:
                costs[kind] = _simulate_stage(config, strategy, workload, on_gpu, stage)
    return [costs[kind] for kind, _ in stages]


def _stages(strategy: Strategy, num_layers: int) -> list[tuple[Any, StagePlan | None]]:
    """The stages with what they cost by: between the first and the last they differ in their number of layers only."""
    if strategy.num_stages == 1:
        return [(None, None)]
    plans = plan_stages(split_layers(num_layers, strategy.num_blocks), strategy.num_stages)
    return [((plan.is_first, plan.is_last, plan.stop - plan.start), plan) for plan in plans]


def _simulate_stage(
    config: PretrainedConfig, strategy: Strategy, workload: Workload, on_gpu: bool, stage: StagePlan | None
) -> StepCost:
    with torch.device("meta"):
        model = _make_model(config, workload.dtype)
        setup = make_setup(model, strategy, workload.lora_r, workload.tied_embeddings, stage)
    with FakeTensorMode():
        _give_fake_memory(setup.model, setup.heads)
        step = _Step(setup, workload, stage)
        loss_costs = loss_as_on_gpu(step.meter) if on_gpu else contextlib.nullcontext()
        with loss_costs, metered_loss(step.meter), step.meter:
            step.run()
            return step.measure()


def _make_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(UNPADDED)
    return model


def _give_fake_memory(*modules: nn.Module) -> None:
    """Puts a fake tensor in place of every parameter and buffer on the meta device; shared ones stay shared.

    Not `to_empty`: within a fake mode `nn.Module` swaps the contents of tensors, and these have weak references.
    """
    fake: dict[torch.Tensor, torch.Tensor] = {}

    def replace(own: dict[str, Any], wrap: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for name, tensor in own.items():
            if tensor is None:
                continue
            if tensor not in fake:
                fake[tensor] = wrap(torch.empty(tensor.shape, dtype=tensor.dtype), tensor)
            own[name] = fake[tensor]

    for module in (part for whole in modules for part in whole.modules()):
        replace(module._parameters, lambda empty, old: nn.Parameter(empty, requires_grad=old.requires_grad))
        replace(module._buffers, lambda empty, old: empty)


def _unpadded_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """The mask that a batch without padding gets; whether there is padding cannot be read off a fake tensor."""
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(UNPADDED, sdpa_attention_forward)
AttentionMaskInterface.register(UNPADDED, _unpadded_mask)


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


class _Step:
    """Optimizer steps of one device."""

    def __init__(self, setup: EndToEnd, workload: Workload, stage: StagePlan | None) -> None:
        self.setup = setup
        self.workload = workload
        self.meter = MemoryMeter()
        self.optimizer = make_optimizer(workload.optim, setup.trainable, setup.model)
        self.reducer = _LoneReducer(self.meter) if workload.num_gpus > 1 and stage is None else None
        tokens_BT = torch.zeros(workload.batch_size, workload.seq_length, dtype=torch.long)
        self.inputs = {"input_ids": tokens_BT, "labels": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
        weights = [*setup.model.parameters(), *setup.model.buffers(), *setup.heads.parameters()]
        self.weights = weights
        self.meter.count(weights, "parameters")
        self.meter.follow_gradients(setup.trainable)
        self.buffers = self._make_buffers(stage)
        self.meter.count(self.buffers, "communication")

    def _make_buffers(self, stage: StagePlan | None) -> list[torch.Tensor]:
        """What communication holds all the time: DDP's buckets, or the hidden states in a pipeline's queues."""
        if stage is not None:
            links = int(not stage.is_first) + int(not stage.is_last)
            hidden_size = find_decoder_stack(self.setup.base).hidden_size
            shape = (links, self.workload.channel_depth, self.workload.batch_size, self.workload.seq_length, hidden_size)
            return [torch.empty(shape, dtype=self.workload.dtype)]
        if self.reducer is None:
            return []
        seen = [p for group in self.setup.clip_groups[self.setup.early_groups :] for p in group if p.requires_grad]
        return [torch.empty_like(parameter) for parameter in seen]

    def run(self) -> None:
        """One optimizer step, as the trainers' loop does it."""
        micro_batches = min(2, self.workload.accumulation_steps)  # the third is as the second
        self.setup.heads.zero_grad()
        for micro_batch in range(micro_batches):
            self.is_last_micro_batch = micro_batch == micro_batches - 1
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.setup.forward(self.inputs, self._run_backward)
            if loss is not None:
                loss.backward()
            del loss
        self._clip()
        with self.meter.region("optimizer"):
            self.optimizer.step()
        self.setup.model.zero_grad()

    def _run_backward(self, index: int, loss: torch.Tensor) -> None:
        loss.backward()
        if self.reducer is not None and self.is_last_micro_batch:
            self.reducer.start(self.setup.clip_groups[index])

    def _clip(self) -> None:
        if self.reducer is not None:
            self.reducer.wait()
        for group in self.setup.clip_groups:
            clip_grad_norm_(group, 1.0)

    def measure(self) -> StepCost:
        """Runs a step and returns what it costs."""
        self.meter.reset_peak()
        with SavedBytes(self.weights) as saved:
            self.run()
        work, steps = self.meter.work, self.workload.accumulation_steps
        repeats = steps / min(2, steps)
        return StepCost(
            peak=self.meter.peak,
            saved_bytes=saved.peak,
            flops=int(work.flops * repeats),
            moved_bytes=int(work.moved_bytes * repeats),
            parameters=sum(weight.numel() for weight in self.weights),
            trainable=sum(weight.numel() for weight in self.setup.trainable),
        )
