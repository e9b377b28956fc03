"""Time of a micro-batch in each part of an image classifier, so that its stages can be cut to take the same time.

Shapes: B batch, T tokens, D hidden channels (of a convolutional network feature maps).
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.blocks import Block
from lopt_hf.local.layer_calls import hidden_of, stop_at
from lopt_hf.local.methods.image.heads import ModelTail, layer_shapes, make_classifier
from lopt_hf.local.methods.image.objectives import ClassifierObjective, FrozenTailObjective
from lopt_hf.local.objectives import LocalBatch, LocalObjective, ReconstructionObjective
from lopt_hf.local.stacks import DecoderStack, example_image, find_stack
from lopt_hf.pipeline.runtime.image.stage import keep_image_stage
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from lopt_hf.pipeline.split.costs import layer_kind
from lopt_hf.pipeline.split.model_costs import ModelCosts
from lopt_hf.pipeline.split.stopwatch import LEAST_SECONDS, NOTHING, PartCost, Stopwatch, num_elements

__all__ = ["measure_image_costs"]


def measure_image_costs(
    model: PreTrainedModel,
    batch_size: int,
    objective: str = "classifier",
    image_size: tuple[int, int] | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    accumulation_steps: int = 1,
    repeats: int = 5,
    least_seconds: float = LEAST_SECONDS,
) -> ModelCosts:
    """Measures the cost of each part of an image classifier in a pipeline of local learners.

    Layers of the same kind and shapes are measured once. The model stays as it is.

    Args:
        model: The image classifier.
        batch_size: Images of a micro-batch.
        objective: The local objective, as `LocalImageArguments` names it.
        image_size: Height and width of the images. Default: those of the model's config.
        autocast: Data type of the arithmetic under autocast; `None`: that of the weights.
        device: Where to measure.
        accumulation_steps: Micro-batches of an optimizer step.
        repeats: Timed runs of each part, at least, of which the median counts. Ours: 5.
        least_seconds: Time to spend on each part, at least.
    """
    stopwatch = Stopwatch(torch.device(device), autocast, repeats, least_seconds)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        own: Any = copy.deepcopy(model)
        bench = _Bench(own.to(device).train(), stopwatch, batch_size, image_size)
        layers, step_seconds = bench.measure_layers()
        objectives = bench.measure_objectives(objective)
        return ModelCosts(
            bench.measure_embeddings(),
            layers,
            NOTHING,
            bench.measure_head(),
            step_seconds,
            accumulation_steps,
            objectives,
        )


class _Bench:
    """Measures the parts of a model, one after the other."""

    def __init__(
        self, model: PreTrainedModel, stopwatch: Stopwatch, batch_size: int, image_size: tuple[int, int] | None
    ) -> None:
        self.model = model
        self.stack: DecoderStack = find_stack(model)
        self.stopwatch = stopwatch
        channels, *own_size = example_image(model.config).shape[1:]
        size = own_size if image_size is None else image_size
        self.pixels = torch.randn(batch_size, channels, *size, device=stopwatch.device)
        self.labels_B = torch.zeros(batch_size, dtype=torch.long, device=stopwatch.device)
        self.inputs: list[torch.Tensor] = []  # of each layer, and what follows the last one
        self._record_inputs()

    @torch.no_grad()
    def _record_inputs(self) -> None:
        handles = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: self.inputs.append(hidden_of(args, kwargs)), with_kwargs=True
            )
            for layer in self.stack.layers
        ]
        with self.stopwatch.precision():
            self.model(pixel_values=self.pixels)
            for handle in handles:
                handle.remove()
            self.inputs.append(self.stack.layers[-1](self.inputs[-1]))

    def _hidden(self, layer: int) -> torch.Tensor:
        """Random hidden states in the shape of a layer's input."""
        return torch.randn_like(self.inputs[layer]).requires_grad_()

    def _trainable(self, module: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    def measure_embeddings(self) -> PartCost:
        """Times what runs before the layers."""

        def run() -> torch.Tensor:
            with stop_at(self.stack.layers[0]) as reached:
                self.stack.decoder(pixel_values=self.pixels)
            return hidden_of(*reached[0])

        own = self._trainable(self.model)
        self.stopwatch.run(run, own)
        return self.stopwatch.measure(run, [parameter for parameter in own if parameter.grad is not None])

    def measure_layers(self) -> tuple[tuple[PartCost, ...], float]:
        """Times one layer of each kind and shape, and the optimizer's step on the largest."""
        costs: dict[Any, PartCost] = {}
        kinds = [
            (layer_kind(layer), self.inputs[index].shape, self.inputs[index + 1].shape)
            for index, layer in enumerate(self.stack.layers)
        ]
        for index, (layer, kind) in enumerate(zip(self.stack.layers, kinds, strict=True)):
            if kind not in costs:
                costs[kind] = self.stopwatch.measure(partial(layer, self._hidden(index)), self._trainable(layer))
        largest = max((self._trainable(layer) for layer in self.stack.layers), key=num_elements)
        for parameter in largest:
            parameter.grad = torch.zeros_like(parameter)
        step = self.stopwatch.measure_step(torch.optim.AdamW(largest, fused=True), largest)
        return tuple(costs[kind] for kind in kinds), step / num_elements(largest)

    def measure_objectives(self, objective: str) -> dict[int, PartCost]:
        """Times the local objective behind each layer but the last, by the layer that follows."""
        if objective == "none":
            return {}
        shapes = layer_shapes(self.model, self.stack)
        costs: dict[torch.Size, PartCost] = {}
        for stop in range(1, len(shapes)):
            if shapes[stop - 1] not in costs:
                costs[shapes[stop - 1]] = self._measure_objective(objective, shapes, stop)
        return {stop: costs[shapes[stop - 1]] for stop in range(1, len(shapes))}

    def _measure_objective(self, name: str, shapes: list[torch.Size], stop: int) -> PartCost:
        objective: LocalObjective
        if name == "reconstruction":
            objective = ReconstructionObjective(masked=False)
            head: nn.Module = objective.make_head(self.stack.hidden_size)
        elif name == "readout":
            head = ModelTail(self.model, self.stack)
            objective = FrozenTailObjective(head)
        else:
            head = make_classifier(self.model, self.stack, shapes, stop - 1)
            objective = ClassifierObjective()
        head.to(self.stopwatch.device).train()
        output_BTD, input_BTD = self._hidden(stop), self._hidden(stop).detach()
        batch = LocalBatch(None, {"labels": self.labels_B})
        return self.stopwatch.measure(lambda: objective(head, output_BTD, input_BTD, batch), self._trainable(head))

    def measure_head(self) -> PartCost:
        """Times what runs behind the layers, task loss included; the model has no layers afterwards."""
        number = len(self.stack.layers)
        last = StagePlan(index=1, num_stages=2, blocks=(Block(1, number, number),), num_layers=number)
        h_BTD = self._hidden(number)
        keep_image_stage(self.model, self.stack, last)
        return self.stopwatch.measure(
            lambda: self.model(pixel_values=h_BTD, labels=self.labels_B).loss, self._trainable(self.model)
        )
