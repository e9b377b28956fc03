"""Language models in `lopt-hf bench pipeline`.

Shapes: B sequences of a micro-batch, T tokens, D hidden channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from lopt_hf.bench.pipeline.lm_head import compute_all_logits
from lopt_hf.bench.pipeline.method_run import MethodRun
from lopt_hf.bench.pipeline.task import ClippedApart, PipelineTask, clip_groups, make_config
from lopt_hf.bench.training import num_layers, token_rows
from lopt_hf.common.upstream.trl import add_sft_head
from lopt_hf.data.pretrained import resolve_model
from lopt_hf.local.embeddings import untie_output_embeddings
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.pipeline.runtime.config import PipelineConfig
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.stage import HiddenStateInput, load_stage
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from lopt_hf.pipeline.runtime.trainer import PipelineTrainer
from lopt_hf.pipeline.split.costs import measure_costs
from lopt_hf.pipeline.split.model_costs import ModelCosts
from lopt_hf.trainers.configs import LoPTConfig
from lopt_hf.trainers.sft import LoPTTrainer

__all__ = ["LanguageTask", "make_rows"]


def make_rows(run: MethodRun, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of all steps, in their order."""
    settings: Any = run.settings
    return token_rows(tokenizer, settings.batch_size * run.total_steps, settings.seq_length, settings.seed)


class LanguageTask(PipelineTask):
    """Supervised fine-tuning of a causal language model on running text."""

    def prepare(self, settings: Any) -> None:
        if settings.lm_head == "logits":
            compute_all_logits()

    def find_model(self, settings: Any, folder: str) -> str:
        return resolve_model(settings.model)

    def num_layers(self, settings: Any, checkpoint: str) -> int:
        return num_layers(settings.model, checkpoint, settings.seq_length)

    def measure_costs(self, settings: Any, checkpoint: str) -> ModelCosts:
        return measure_costs(
            checkpoint,
            settings.micro_batch_size,
            settings.seq_length,
            objective=settings.objective,
            autocast=torch.bfloat16 if settings.dtype == "bfloat16" else None,
            accumulation_steps=settings.microbatches,
        )

    def make_config(self, run: MethodRun) -> SFTConfig:
        return make_config(run, PipelineConfig, LoPTConfig, SFTConfig, max_length=None)

    def make_trainer(self, run: MethodRun, plan: StagePlan | None, world: PipelineWorld | None) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(run.checkpoint)
        shared: dict[str, Any] = {
            "args": self.make_config(run),
            "train_dataset": Dataset.from_dict({"input_ids": make_rows(run, tokenizer)}),
            "processing_class": tokenizer,
        }
        if plan is not None and world is not None:
            part = PipelineTrainer.load_part(run.checkpoint, plan, shared["args"], dtype=torch.float32)
            return PipelineTrainer(part, world=world, **shared)
        model = AutoModelForCausalLM.from_pretrained(run.checkpoint, dtype=torch.float32)
        if run.method == "lopt":
            return LoPTTrainer(model, **shared)
        untie_output_embeddings(model)  # as on two stages of a pipeline
        trainer = _EndToEndTrainer(model, **shared)
        trainer.groups = clip_groups(model, run.parts_at)
        return trainer

    def load_stage(self, run: MethodRun, plan: StagePlan) -> PreTrainedModel:
        return load_stage(run.checkpoint, plan, dtype=torch.float32)

    def make_stage(self, run: MethodRun, plan: StagePlan, model: PreTrainedModel) -> nn.Module:
        return _StageModule(model, plan, run)

    def make_batches(self, run: MethodRun) -> list[tuple[Mapping[str, torch.Tensor], torch.Tensor]]:
        rows = torch.tensor(make_rows(run, AutoTokenizer.from_pretrained(run.checkpoint)))
        return [({"tokens_BT": tokens}, tokens) for tokens in rows.split(run.settings.batch_size)]

    def message_bytes(self, run: MethodRun, layer: int) -> int:
        settings: Any = run.settings
        hidden_size = AutoConfig.from_pretrained(run.checkpoint).get_text_config(decoder=True).hidden_size
        values: int = settings.micro_batch_size * settings.seq_length * hidden_size
        return values * torch.finfo(torch.float32).bits // 8


class _EndToEndTrainer(ClippedApart, SFTTrainer):
    """TRL's trainer."""


class _StageModule(nn.Module):
    """A stage's part of the model as torch's schedules call it; the last one returns the loss."""

    def __init__(self, model: PreTrainedModel, plan: StagePlan, run: MethodRun) -> None:
        super().__init__()
        settings: Any = run.settings
        self.model = model
        self.plan = plan
        self.autocast = settings.dtype == "bfloat16"
        # As TRL counts them: the first token of a sequence is predicted from nothing.
        self.num_predicted = settings.batch_size * (settings.seq_length - 1)
        self.input = None if plan.is_first else HiddenStateInput(find_decoder_stack(model).layers[plan.start])
        if plan.is_last:
            add_sft_head(model)

    def forward(self, input: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Runs the stage on hidden states (B, T, D), the first one on `tokens_BT`, which is `input` there."""
        if self.input is not None:
            self.input.hidden_BTD = input
        inputs = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "use_cache": False}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if not self.plan.is_last:
                return self.model.base_model(**inputs).last_hidden_state
            outputs = self.model(**inputs, labels=tokens_BT, fused_lm_head=True)
        return -outputs.log_probs.sum() / self.num_predicted

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The micro-batch's share of the batch's mean loss, which the last stage's output is."""
        return output
