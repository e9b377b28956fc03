"""Reach of the gradient of each loss of a training step, measured and plotted."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from trl import SFTTrainer

from lopt_hf.common.figures import draw_heat_map, new_figure
from lopt_hf.local.blocks import Block
from lopt_hf.local.micro_batch import BoundaryEvents, MicroBatch
from lopt_hf.local.ownership import parameters_by_block
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.pipeline.runtime.trainer import PipelineTrainer
from lopt_hf.trainers.mixin import LocalLearningMixin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GradientReach", "measure_gradient_reach", "plot_gradient_reach"]

EMBEDDINGS, HEAD = "embeddings", "norm, head"
NO_GRADIENT = "#e4e4e4"
WIDTH = 9.0  # inches


@dataclass(frozen=True)
class GradientReach:
    """Norm of the gradient of each loss of a training step in each part of a model.

    Attributes:
        losses: Names of the losses, in the order of their blocks; the task's is the last.
        parts: `embeddings`, the decoder layers by their number, and `norm, head`. Tied embeddings count as
            `embeddings`.
        norms: For each loss the norm of its gradient in each part, weighted as in training, but for the factors of
            `reach_unit="microbatch"`; exactly 0 where it does not reach.
    """

    losses: tuple[str, ...]
    parts: tuple[str, ...]
    norms: tuple[tuple[float, ...], ...]


def measure_gradient_reach(trainer: SFTTrainer, reach: int | None = None) -> GradientReach:
    """Runs the backward of each loss of a training step by itself and looks where its gradient arrives.

    It takes a micro-batch from the beginning of the training set, and a forward and backward for each loss. Weights,
    gradients and random states are left as they were.

    Args:
        trainer: An `SFTTrainer`, a `LoPTTrainer` or an `MLAANTrainer`, before training or after it.
        reach: Which step of a schedule of reach it is: one of the numbers of `task_reach`, or `window` of MLAAN where
            that is larger. Default: the highest.

    Raises:
        ValueError: If the trainer is of another kind, or one of several processes, or if it has no step of such a
            reach.

    Example:

    ```python
    reach = measure_gradient_reach(trainer)
    plot_gradient_reach({"LoPT": reach}).savefig("reach.png")
    ```
    """
    _check(trainer)
    reach = _reach_of_step(trainer, reach)
    dataset: Any = trainer.train_dataset
    rows = list(islice(dataset, trainer.args.per_device_train_batch_size))
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    parts = _parts(trainer.model)
    norms = {}
    with _undisturbed(trainer) as clear:
        for name, index in _losses(trainer).items():
            clear()
            _backward(trainer, inputs, index, reach)
            norms[name] = tuple(_norm(parameters) for parameters in parts.values())
    return GradientReach(tuple(norms), tuple(parts), tuple(norms.values()))


def _check(trainer: Any) -> None:
    if not isinstance(trainer, SFTTrainer) or isinstance(trainer, PipelineTrainer):
        raise ValueError(
            f"trainer={type(trainer).__name__} does not have the whole step of supervised fine-tuning; pass an "
            "SFTTrainer, a LoPTTrainer or an MLAANTrainer."
        )
    if trainer.accelerator.distributed_type != DistributedType.NO:
        raise ValueError(
            f"trainer runs under {trainer.accelerator.distributed_type.value}, where gradients are elsewhere or "
            "averaged; measure in one process."
        )


def _reach_of_step(trainer: Any, reach: int | None) -> int:
    """How far the task's gradient reaches at the step to measure, in blocks."""
    cycle = trainer.learner.schedule.cycle if isinstance(trainer, LocalLearningMixin) else ()
    if reach is None:
        return max(cycle, default=1)
    if reach not in cycle:
        raise ValueError(
            f"reach={reach} is none of the reaches {sorted(set(cycle))} that {type(trainer).__name__} trains with; "
            "use one of them, or leave it out."
        )
    return reach


def _losses(trainer: Any) -> dict[str, int]:
    """Each loss's name and the index of its block."""
    if not isinstance(trainer, LocalLearningMixin):
        return {"task loss": 0}
    early = trainer.local_heads if trainer.boundary.learns_locally else ()
    local = {f"local loss, block {index}": int(index) for index in early}
    return {**local, "task loss": len(trainer.blocks) - 1}


def _parts(model: Any) -> dict[str, list[nn.Parameter]]:
    base_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    stack = find_decoder_stack(base_model)
    layers = [list(layer.parameters()) for layer in stack.layers]
    inside = {id(parameter) for layer in layers for parameter in layer}
    owned = parameters_by_block(model, stack, [Block(i, i, i + 1) for i in range(len(layers))])
    before, after = ([p for p in owned[end].values() if id(p) not in inside] for end in (0, -1))
    return {EMBEDDINGS: before, **{str(i): layer for i, layer in enumerate(layers)}, HEAD: after}


def _backward(trainer: Any, inputs: Mapping[str, Any], only: int, reach: int) -> None:
    """The backward of one loss: all run, as in training, the others multiplied by 0."""

    def run_backward(index: int, loss: torch.Tensor) -> None:
        (loss if index == only else loss * 0).backward()

    if not isinstance(trainer, LocalLearningMixin):
        run_backward(only, _task_loss(trainer, inputs))
        return
    updates = trainer.learner.method.trains_early_blocks(trainer.learner, step=0)
    micro_batch = MicroBatch(BoundaryEvents(run_backward), trains_early_blocks=updates, inputs=inputs, reach=reach)
    try:
        with trainer.boundary.training_forward(micro_batch):
            loss = _task_loss(trainer, inputs)
        run_backward(len(trainer.blocks) - 1, loss)
        trainer.boundary.finish(micro_batch)
    finally:
        trainer.boundary.abandon()


def _task_loss(trainer: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    with trainer.compute_loss_context_manager():
        loss: torch.Tensor = trainer.model(**inputs, use_cache=False).loss
    return loss


def _norm(parameters: Sequence[nn.Parameter]) -> float:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


@contextmanager
def _undisturbed(trainer: Any) -> Iterator[Any]:
    """Evaluation mode (no dropout) and separate backwards; all is put back afterwards. Gives what clears gradients."""
    is_local = isinstance(trainer, LocalLearningMixin)
    modules: list[nn.Module] = [trainer.model, *([trainer.local_heads] if is_local else [])]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    gradients = [parameter.grad for parameter in parameters]
    training = [module.training for module in modules]

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    for module in modules:
        module.eval()
    try:
        with _separate_backwards(trainer.boundary) if is_local else nullcontext():
            yield clear
    finally:
        for module, trains in zip(modules, training, strict=True):
            module.train(trains)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def _separate_backwards(boundary: Any) -> Iterator[None]:
    """Each local loss has its backward in the forward."""
    mode, unchecked = boundary.mode, set(boundary._unchecked_replays)
    boundary.mode = "eager"
    try:
        yield
    finally:
        boundary.mode = mode
        # Without dropout a block that runs again shows less than in training, where its first time is to be checked.
        boundary._unchecked_replays = unchecked


def plot_gradient_reach(reaches: Mapping[str, GradientReach]) -> "Figure":
    """A heat map for each model, one row for each loss, one column for each part; all share their colours.

    Args:
        reaches: What was measured, by the title of its panel.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is nothing to draw.
    """
    if not reaches:
        raise ValueError("reaches is empty; give at least one measurement.")
    rows = [len(reach.losses) for reach in reaches.values()]
    figure = new_figure(WIDTH, 1.1 + sum(0.6 + 0.3 * count for count in rows))
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    norms = [norm for reach in reaches.values() for row in reach.norms for norm in row if norm > 0]
    for axes, (title, reach) in zip(panels, reaches.items(), strict=True):
        image = _draw_reach(axes, reach, (min(norms, default=1e-1), max(norms, default=1.0)))
        axes.set_title(title, loc="left", fontsize="medium")
    figure.colorbar(image, ax=list(panels), label="norm of the gradient", aspect=12, pad=0.02)
    panels[-1].set_xlabel("decoder layer (grey: exactly no gradient)")
    return figure


def _draw_reach(axes: "Axes", reach: GradientReach, limits: tuple[float, float]) -> Any:
    image = draw_heat_map(axes, reach.norms, limits, NO_GRADIENT, gap=1.5)
    step = 1 if len(reach.parts) <= 20 else 5
    named = [i for i, part in enumerate(reach.parts) if not part.isdigit() or int(part) % step == 0]
    first, *_, last = axes.set_xticks(named, [reach.parts[i] for i in named])
    first.label1.set_horizontalalignment("right")  # their names are wider than their columns
    last.label1.set_horizontalalignment("left")
    axes.set_yticks(range(len(reach.losses)), reach.losses)
    return image
