"""Layers taken out of a model, and the surrogates put in their places.

Four things say which layers a model has: the `ModuleList`, each layer's `layer_idx` (its slot in the KV cache),
`config.num_hidden_layers`, and the config's lists with one entry for each layer. They stay in step here.

A surrogate is a child of the layer that follows it and runs before that layer, or of the layer before it, in whose MLP
it runs: it has no entry in the `ModuleList` and no slot in the cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ResNetPreTrainedModel

from lopt_hf.common.upstream.torch import remove_forward_hooks, remove_forward_pre_hooks
from lopt_hf.local.layer_calls import output_hidden, with_output_hidden
from lopt_hf.repl.map_operators import MLPMap
from lopt_hf.repl.modeling_repl import SurrogateHook, find_layers, find_stages
from lopt_hf.repl.neighbours import Neighbour

__all__ = [
    "PER_LAYER_LISTS",
    "SynthesisHook",
    "attach",
    "attach_in_mlp",
    "detach",
    "detach_from_mlp",
    "hooked_paths",
    "kept_index",
    "relative_distance",
    "remove_layers",
]

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def kept_index(layer: int, removed: Sequence[int]) -> int:
    """The number that a layer which stays has after the removal."""
    return layer - sum(other < layer for other in removed)


def remove_layers(model: PreTrainedModel, removed: Sequence[int]) -> list[nn.Module]:
    """Takes layers out of a model, in place.

    Args:
        model: A model with one stack of layers, or a ResNet.
        removed: Their numbers, from 0.

    Returns:
        The layers taken out.
    """
    layers = find_layers(model)
    gone = [layers[index] for index in removed]
    if isinstance(model, ResNetPreTrainedModel):
        _remove_blocks(model, gone)
        return gone
    kept = [layer for index, layer in enumerate(layers) if index not in removed]
    config: Any = model.config.get_text_config()
    lists = {name: values for name, values in config.to_dict().items() if name in PER_LAYER_LISTS and values}
    _renumber_experts(config, removed)
    if "max_window_layers" in config.to_dict():  # Qwen: the layers from this one on attend in a window
        config.max_window_layers = kept_index(config.max_window_layers, removed)
    config.num_hidden_layers = len(kept)
    for name, values in lists.items():
        setattr(config, name, [value for index, value in enumerate(values) if index not in removed])
    del layers[:]
    layers.extend(kept)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                module.layer_idx = index  # type: ignore[assignment]
    return gone


def _remove_blocks(model: Any, gone: Sequence[nn.Module]) -> None:
    """Takes residual blocks out of their stages."""
    stages = find_stages(model)
    for stage in stages:
        for index in reversed([index for index, block in enumerate(stage) if block in gone]):
            del stage[index]
    model.config.depths = [len(stage) for stage in stages]


def _renumber_experts(config: Any, removed: Sequence[int]) -> None:
    """Says which layers have no experts by their new numbers (Qwen's MoE families say it by layer or by a step)."""
    values = config.to_dict()
    if "mlp_only_layers" not in values:
        return
    step, dense = values["decoder_sparse_step"], values["mlp_only_layers"] or []
    kept = [layer for layer in range(values["num_hidden_layers"]) if layer not in removed]
    config.mlp_only_layers = [i for i, layer in enumerate(kept) if layer in dense or (layer + 1) % step]
    config.decoder_sparse_step = 1


class SynthesisHook(SurrogateHook):
    """Runs a layer's surrogate with weights synthesised from this layer and the one before.

    Args:
        previous: The layer before the removed ones.
        following: The layer after them, whose hook this is.
    """

    def __init__(self, previous: Neighbour, following: Neighbour) -> None:
        self.previous = previous
        self.following = following

    def run(self, layer: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
        output_BTD: torch.Tensor = layer.surrogate(hidden_BTD, self.previous, self.following)
        return output_BTD


def relative_distance(
    output_BTD: torch.Tensor, target_BTD: torch.Tensor, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean square distance of each token from its target, relative to what the removed layers added to it.

    Args:
        output_BTD: What comes of a surrogate.
        target_BTD: What comes of the removed layers.
        hidden_BTD: What the removed layers were given.
        mask_BT: The tokens that count; `None`: all.
    """
    added_BT = (target_BTD - hidden_BTD.detach()).float().pow(2).mean(-1)
    error_BT = (output_BTD - target_BTD).float().pow(2).mean(-1)
    share_BT = error_BT / added_BT.clamp_min(torch.finfo(torch.float32).tiny)
    return (share_BT if mask_BT is None else share_BT[mask_BT]).mean()


def attach(layer: Any, surrogate: nn.Module, hook: SurrogateHook) -> None:
    """Puts a surrogate in front of a layer, in place of one that is there already."""
    detach(layer)
    layer.surrogate = surrogate
    layer.register_forward_pre_hook(hook, with_kwargs=True)


def detach(layer: Any) -> None:
    """Takes a layer's surrogate and its hook away, if it has one."""
    if "surrogate" in dict(layer.named_children()):
        del layer.surrogate
    remove_forward_pre_hooks(layer, SurrogateHook)


class MLPHook:
    """Adds what the surrogate of a layer makes to its MLP's output: a forward hook of a module in the MLP.

    Args:
        previous: The layer before the removed ones, whose surrogate this runs.
        reads_input: Whether the surrogate reads the module's input; else its output.
    """

    def __init__(self, previous: Neighbour, reads_input: bool) -> None:
        self.previous, self.reads_input = previous, reads_input

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        layer: Any = self.previous.layer
        mlp_BTD = output_hidden(output)
        added_BTD = layer.surrogate(args[0] if self.reads_input else mlp_BTD)
        return with_output_hidden(output, mlp_BTD + added_BTD.to(mlp_BTD.dtype))


def attach_in_mlp(previous: Neighbour, surrogate: MLPMap) -> None:
    """Puts a surrogate into the MLP of the layer before the removed ones."""
    previous.layer.surrogate = surrogate
    surrogate.place(previous).register_forward_hook(MLPHook(previous, surrogate.reads_input))


def detach_from_mlp(previous: Neighbour, surrogate: MLPMap) -> None:
    """Takes the surrogate out of a layer's MLP."""
    remove_forward_hooks(surrogate.place(previous), MLPHook)
    del previous.layer.surrogate


def hooked_paths(model: Any) -> list[str]:
    """Finds the modules behind or before which a model's surrogates run, by their paths."""
    paths = {module: path for path, module in model.named_modules()}
    found = []
    for layer in find_layers(model):
        surrogate = dict(layer.named_children()).get("surrogate")
        if isinstance(surrogate, MLPMap):
            found.append(paths[surrogate.place(Neighbour(layer, model.config, model.config.repl["family"]))])
        elif surrogate is not None:
            found.append(paths[layer])
    return found
