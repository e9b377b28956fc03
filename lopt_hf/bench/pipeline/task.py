"""What differs between kinds of models in `lopt-hf bench pipeline`: a task makes models, batches and trainers."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, TrainingArguments

from lopt_hf.bench.pipeline.method_run import MethodRun
from lopt_hf.bench.pipeline.settings import DELAYED
from lopt_hf.bench.training import SHARED_ARGUMENTS
from lopt_hf.local.blocks import split_layers
from lopt_hf.local.ownership import parameters_by_block
from lopt_hf.local.stacks import find_stack
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from lopt_hf.pipeline.split.model_costs import ModelCosts

__all__ = ["ClippedApart", "PipelineTask", "clip_groups", "make_config"]


class PipelineTask(Protocol):
    """A kind of models, for which all methods train on the same batches, by the same arithmetic."""

    def prepare(self, settings: Any) -> None:
        """What every process does before it makes a model."""

    def find_model(self, settings: Any, folder: str) -> str:
        """Returns the folder or hub id of the model, which is made in `folder` if it is from random weights.

        Raises:
            ValueError: If there is none.
        """

    def num_layers(self, settings: Any, checkpoint: str) -> int:
        """The number of layers of the model.

        Raises:
            ValueError: If the model does not fit the settings.
        """

    def measure_costs(self, settings: Any, checkpoint: str) -> ModelCosts:
        """Measures the parts of the model."""

    def make_config(self, run: MethodRun) -> TrainingArguments:
        """The training arguments of a method; all have the same batches, optimizer and clipping."""

    def make_trainer(self, run: MethodRun, plan: StagePlan | None, world: PipelineWorld | None) -> Any:
        """Makes the trainer of a method, of a stage if a plan is given."""

    def load_stage(self, run: MethodRun, plan: StagePlan) -> PreTrainedModel:
        """Loads a stage's part of the model."""

    def make_stage(self, run: MethodRun, plan: StagePlan, model: PreTrainedModel) -> nn.Module:
        """Makes of a stage's part what torch's schedules call: its `forward`, and on the last stage its `loss`."""

    def make_batches(self, run: MethodRun) -> list[tuple[Mapping[str, torch.Tensor], torch.Tensor]]:
        """For each step what every stage is given by name, and the target; the first stage is given the first too."""

    def message_bytes(self, run: MethodRun, layer: int) -> int:
        """Bytes of a micro-batch's hidden states behind a layer, in fp32."""


def make_config(
    run: MethodRun,
    stage: Callable[..., TrainingArguments],
    local: Callable[..., TrainingArguments],
    plain: Callable[..., TrainingArguments],
    **others: Any,
) -> Any:
    """Makes the training arguments of a method; all have the same batches, optimizer and clipping.

    Args:
        run: The method's run.
        stage: Makes those of a pipeline of the package's.
        local: Makes those of local learning in one process.
        plain: Makes those of end-to-end training.
        **others: Arguments of all methods of the task.
    """
    settings = run.settings
    shared = {
        "output_dir": run.folder,
        "max_steps": run.total_steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.microbatches,
        "bf16": settings.dtype == "bfloat16",
        "use_cpu": True,
        "activation_checkpointing": False,
        "seed": settings.seed,
        **SHARED_ARGUMENTS,
        **others,
    }
    cut = {"num_blocks": settings.stages, "split_at": run.split_at}
    if run.method in DELAYED:  # without a local objective
        delayed = {"gradient": "delayed", "gradient_recompute": run.method == "ppll_delayed"}
        return stage(**shared, **cut, **delayed)
    if run.method == "ppll":
        return stage(**shared, **cut, gradient="local", local_objective=settings.objective)
    if run.method == settings.one_process:
        return local(**shared, **cut, local_objective=settings.objective)
    return plain(**shared)


def clip_groups(model: PreTrainedModel, parts_at: list[int]) -> list[list[torch.nn.Parameter]]:
    """The trainable parameters of each part of a model, or of a stage's part of one; parts it has nothing of are out.

    Args:
        model: The model, or what a stage holds of it.
        parts_at: First layer of every part but the first.
    """
    stack = find_stack(model)
    blocks = split_layers(len(stack.layers), len(parts_at) + 1, parts_at)
    parts = parameters_by_block(model, stack, blocks)
    groups = [[parameter for parameter in part.values() if parameter.requires_grad] for part in parts]
    return [group for group in groups if group]


class ClippedApart:
    """To be mixed in before a trainer: the gradient of each part of the model is clipped apart, as in all methods.

    Attributes:
        groups: The parameters of each part.
    """

    groups: list[list[nn.Parameter]]
    args: Any

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        norms = [clip_grad_norm_(group, self.args.max_grad_norm) for group in self.groups]
        return torch.linalg.vector_norm(torch.stack(norms))
