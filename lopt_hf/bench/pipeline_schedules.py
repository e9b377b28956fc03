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
from transformers import AutoTokenizer, PreTrainedModel, Trainer

from lopt_hf.bench.pipeline_settings import TWO_STAGES_PER_RANK
from lopt_hf.bench.pipeline_worker import MethodRun, Record, clip_groups, make_config, make_plans, make_rows, prepare
from lopt_hf.common.host_store import LOOPBACK
from lopt_hf.common.upstream.trl import add_fused_lm_head
from lopt_hf.local.blocks import find_decoder_stack
from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.pipeline.runtime.stage import HiddenStateInput, StagePlan, load_stage
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.pipeline.simulator.torch_schedules import TORCH_SCHEDULES
from lopt_hf.pipeline.split.costs import SFT_OUTPUTS

__all__ = ["ScheduledTraining", "stages_of", "train_by_schedule"]

V_SHAPED = ("zbv", "dualpipev")  # rank 0 has the first stage and the last


class _StageModule(nn.Module):
    """A stage's part of the model as torch's schedules call it; the last one returns what `loss` takes."""

    def __init__(self, model: PreTrainedModel, plan: StagePlan, run: MethodRun) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.autocast = run.settings.dtype == "bfloat16"
        # As TRL counts them: the first token of a sequence is predicted from nothing.
        self.num_predicted = run.settings.batch_size * (run.settings.seq_length - 1)
        self.fused = run.settings.schedule_loss == "fused"
        self.input = None if plan.is_first else HiddenStateInput(find_decoder_stack(model).layers[plan.start])
        if plan.is_last and self.fused:
            add_fused_lm_head(model, outputs=SFT_OUTPUTS)

    def forward(self, input: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Runs the stage on hidden states (B, T, D), the first one on `tokens_BT`, which is `input` there."""
        if self.input is not None:
            self.input.hidden_BTD = input
        inputs = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "use_cache": False}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if not self.plan.is_last:
                return self.model.base_model(**inputs).last_hidden_state
            if not self.fused:
                return self.model(**inputs).logits
            outputs = self.model(**inputs, labels=tokens_BT, fused_lm_head=True)
        return -outputs.log_probs.sum() / self.num_predicted

    def loss(self, output: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
        """The micro-batch's share of the batch's mean loss, of the last stage's output."""
        if self.fused:
            return output
        vocab_size = self.model.config.get_text_config(decoder=True).vocab_size
        return self.model.loss_function(output, target_BT, vocab_size, num_items_in_batch=self.num_predicted)


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


def stages_of(method: str, rank: int, ranks: int) -> list[int]:
    """The stages that a rank runs, in their order.

    Args:
        method: One of torch's schedules.
        rank: The rank.
        ranks: Number of ranks.
    """
    if method not in TWO_STAGES_PER_RANK:
        return [rank]
    return [rank, 2 * ranks - 1 - rank] if method in V_SHAPED else [rank, ranks + rank]


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
        self.models = [load_stage(run.checkpoint, plans[index], dtype=torch.float32).train() for index in indices]
        self.modules = nn.ModuleList(
            _StageModule(model, plans[index], run) for index, model in zip(indices, self.models, strict=True)
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
        args = make_config(run)
        self.max_grad_norm = args.max_grad_norm
        self.clip_groups = [group for model in self.models for group in clip_groups(model, run.parts_at)]
        optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(args)
        parameters = [parameter for group in self.clip_groups for parameter in group]
        self.optimizer = optimizer_class(parameters, weight_decay=args.weight_decay, **arguments)
        rows = make_rows(run, AutoTokenizer.from_pretrained(run.checkpoint))
        self.batches = torch.tensor(rows).split(settings.batch_size)

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
        tokens = self.batches[step]
        losses: list[torch.Tensor] = []
        args = (tokens,) if self.is_first else ()
        last = {"target": tokens, "losses": losses} if self.is_last else {}
        self.schedule.step(*args, tokens_BT=tokens, **last, return_outputs=False)
        return losses
