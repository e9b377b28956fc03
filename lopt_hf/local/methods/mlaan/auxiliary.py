"""LAM, the leap augmented module: what stands between a block's output and its loss.

Shapes: B batch, T tokens, D hidden channels.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lopt_hf.common.upstream.torch import BatchNorm, clear_forward_hooks
from lopt_hf.local.layer_calls import LayerCall
from lopt_hf.local.methods.mlaan.translator import Translator, TranslatorFit

__all__ = ["Gap", "LeapAuxiliary", "copy_layer"]

Gap = tuple[int, int]  # of left-out layers: the first of them, and the first after them


class LeapAuxiliary(nn.Module):
    """Trainable copies of a few deeper layers, some beside an exponential moving average of the live layer.

    At the start each copy is the pretrained layer, and so is each average. With `combine="mean"` and without
    translators the auxiliary is then exactly the rest of the pretrained model with some layers left out.

    Frozen weights are shared with the live layer: with LoRA a copy costs its own factors only.

    Args:
        model: The model whose decoder layers are leapt to.
        layers: Its decoder layers.
        leaps: Indices of the leapt layers, in order. None of them: the auxiliary lets its input through.
        averaged: Those of them that have an average beside them.
        combine: `"mean"` of the copy's and the average's output, or their `"sum"` (the papers' code).
        hidden_size: Width D.
        stop: With it a translator stands before each gap of left-out layers, the first of which may begin here.
        checkpointing: Compute the layers again in the backward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        leaps: Sequence[int],
        averaged: Sequence[int],
        combine: Literal["mean", "sum"],
        hidden_size: int,
        stop: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.leaps = tuple(leaps)
        self.combine = combine
        begins = [] if stop is None else [stop, *(index + 1 for index in leaps[:-1])]
        self.gaps: list[Gap] = [gap for gap in zip(begins, leaps, strict=False) if gap[0] != gap[1]]
        self.translators = nn.ModuleDict({str(end): Translator(hidden_size) for _, end in self.gaps})
        self.copies = nn.ModuleDict({str(i): copy_layer(model, layers[i]) for i in leaps})
        averages = {str(i): copy_layer(model, layers[i]).requires_grad_(False) for i in averaged}
        self.averages = nn.ModuleDict(averages)

    def forward(self, h_BTD: torch.Tensor, calls: Mapping[int, LayerCall]) -> torch.Tensor:
        """The hidden states after the last leapt layer, for the model's final norm and LM head.

        Args:
            h_BTD: A block's output.
            calls: How the decoder calls its layers in this forward.
        """
        for index in self.leaps:
            h_BTD = self._step(index, h_BTD, calls[index])
        return h_BTD

    def calibrate(self, fits: Mapping[Gap, TranslatorFit]) -> None:
        """Sets the translators of those gaps that are fitted."""
        for gap in self.gaps:
            if gap in fits:
                fits[gap].solve(cast(Translator, self.translators[str(gap[1])]))

    def _step(self, index: int, h_BTD: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """One leapt layer, with what stands before and beside it."""
        name = str(index)
        if name in self.translators:
            h_BTD = self.translators[name](h_BTD)
        output_BTD = self._run(self.copies[name], h_BTD, call)
        if name not in self.averages:
            return output_BTD
        total_BTD = output_BTD + self._run(self.averages[name], h_BTD, call)
        return total_BTD / 2 if self.combine == "mean" else total_BTD

    def _run(self, layer: nn.Module, h_BTD: torch.Tensor, call: LayerCall) -> torch.Tensor:
        if not self.checkpointing or not h_BTD.requires_grad:
            return call(layer, h_BTD)
        # Reentrant: what it computes again is seen by `bench step`, and the auxiliary's backward is an ordinary one.
        return cast(torch.Tensor, checkpoint(call, layer, h_BTD, use_reentrant=True))

    @torch.no_grad()
    def update_averages(self, layers: nn.ModuleList, decay: float) -> None:
        """Moves each average towards the live layer: `e <- decay * e + (1 - decay) * theta`."""
        for name, average in self.averages.items():
            live = dict(layers[int(name)].named_parameters())
            for parameter_name, parameter in average.named_parameters():
                if parameter is not live[parameter_name]:  # frozen weights are shared
                    parameter.lerp_(live[parameter_name].to(parameter), 1 - decay)

    @torch.no_grad()
    def distances(self, layers: nn.ModuleList) -> dict[str, float]:
        """How far copies and averages are from the live layers: `||W - theta|| / ||theta||`.

        Args:
            layers: The model's decoder layers.

        Returns:
            Distances by names such as `copy of layer 29`; of an average that is how far it lags behind.
        """
        kinds = (("copy", self.copies), ("average", self.averages))
        return {
            f"{kind} of layer {index}": _distance(module, layers[int(index)])
            for kind, modules in kinds
            for index, module in modules.items()
        }


def _distance(module: nn.Module, live: nn.Module) -> float:
    pairs = list(zip(module.parameters(), live.parameters(), strict=True))
    apart = sum((own - other.to(own)).double().square().sum().item() for own, other in pairs)
    return (apart / sum(other.double().square().sum().item() for _, other in pairs)) ** 0.5


def copy_layer(model: PreTrainedModel, layer: nn.Module) -> nn.Module:
    """A layer with copies of the trainable weights, which shares the frozen ones and the model's configuration."""
    moving = {id(b) for m in layer.modules() if isinstance(m, BatchNorm) for b in m.buffers()}  # each has its own
    shared: list[object] = [buffer for buffer in layer.buffers() if id(buffer) not in moving]
    shared += [model.config, model.config.get_text_config(decoder=True)]
    copies: dict[int, object] = {id(value): value for value in shared}
    for parameter in layer.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().clone()) if parameter.requires_grad else parameter
    made: nn.Module = copy.deepcopy(layer, copies)
    for module in made.modules():  # hooks are the live layer's
        clear_forward_hooks(module)
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = False  # the auxiliary's own option says it
    return made
