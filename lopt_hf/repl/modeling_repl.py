"""Folded RepL models: some layers of a stock model are replaced by static surrogates.

Copied beside exported checkpoints, for `trust_remote_code=True`: imports torch and transformers only.

Shapes: B batch, T tokens, D hidden channels, I inner width of the MLP; C channels, H height, W width of feature maps.
"""

import shutil
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetPreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = [
    "FoldedConvolution",
    "FoldedSurrogate",
    "SurrogateHook",
    "family_classes",
    "find_layers",
    "find_made_class",
    "find_stages",
    "loadable_classes",
    "make_folded",
    "make_folded_classes",
]


CODE_FILES = ("configuration_repl.py", "modeling_repl.py")  # beside each other here, and in a checkpoint
FOLDED_PREFIX = "FoldedRepL"
HUB_ARGUMENTS = ("repo_id", "commit_message", "private", "create_pr")  # of `save_pretrained`, for an upload alone


class FoldedMLP(nn.Module):
    """The MLP of a surrogate, its norm's weights folded in.

    Args:
        spec: `norm`, `eps`, `intermediate_size`, `gated`, `bias` (of up and gate), `down_bias`, `post_norm`,
            `activation`.
        hidden_size: Its width outside, D.
    """

    def __init__(self, spec: Mapping[str, Any], hidden_size: int) -> None:
        super().__init__()
        self.spec = dict(spec)
        inner = spec["intermediate_size"]
        self.up = nn.Linear(hidden_size, inner, bias=spec["bias"])
        self.gate = nn.Linear(hidden_size, inner, bias=spec["bias"]) if spec["gated"] else None
        self.down = nn.Linear(inner, hidden_size, bias=spec["down_bias"])
        self.post_norm = nn.Parameter(torch.ones(hidden_size)) if spec["post_norm"] else None
        self.activation = ACT2FN[spec["activation"]]

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = normalise(h_BTD, self.spec["norm"], self.spec["eps"])
        up_BTI = self.up(x_BTD)
        inner_BTI = self.activation(up_BTI) if self.gate is None else self.activation(self.gate(x_BTD)) * up_BTI
        output_BTD = self.down(inner_BTI)
        if self.post_norm is None:
            return output_BTD
        return normalise(output_BTD, self.spec["norm"], self.spec["eps"]) * self.post_norm


class FoldedSurrogate(nn.Module):
    """What stands in a removed layer's place: `h + scale * h + linear(norm(h)) + mlp(norm(h))`, or a part of that.

    Args:
        spec: `hidden_size`, `norm` and `eps` of the linear map's input, whether there is a `scale`, a `linear` map,
            its `bias`; the `mlp`'s own spec or `None`; whether the MLP is `sequential` (reads what the rest has made).
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = dict(spec)
        size = spec["hidden_size"]
        self.scale = nn.Parameter(torch.zeros(size)) if spec["scale"] else None
        self.linear = nn.Linear(size, size, bias=spec["bias"]) if spec["linear"] else None
        self.mlp = FoldedMLP(spec["mlp"], size) if spec["mlp"] else None

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        output_BTD = h_BTD
        if self.scale is not None:
            output_BTD = output_BTD + self.scale * h_BTD
        if self.linear is not None:
            output_BTD = output_BTD + self.linear(normalise(h_BTD, self.spec["norm"], self.spec["eps"]))
        if self.mlp is not None:
            output_BTD = output_BTD + self.mlp(output_BTD if self.spec["sequential"] else h_BTD)
        # A residual stream keeps its precision, as it does through the model's own layers under autocast.
        return output_BTD.to(h_BTD.dtype)


class FoldedConvolution(nn.Module):
    """What stands in a removed residual block's place: `act(h + convolution(h))`.

    Args:
        spec: `channels`, `kernel_size`, whether there is a `bias`, `activation`.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = dict(spec)
        channels, size = spec["channels"], spec["kernel_size"]
        self.convolution = nn.Conv2d(channels, channels, size, padding=size // 2, bias=spec["bias"])
        self.activation = ACT2FN[spec["activation"]]

    def forward(self, h_BCHW: torch.Tensor) -> torch.Tensor:
        output_BCHW: torch.Tensor = self.activation(h_BCHW + self.convolution(h_BCHW))
        return output_BCHW.to(h_BCHW.dtype)


def make_folded(spec: Mapping[str, Any]) -> FoldedSurrogate | FoldedConvolution:
    """The module that a spec describes."""
    return FoldedConvolution(spec) if "kernel_size" in spec else FoldedSurrogate(spec)


def normalise(h_BTD: torch.Tensor, kind: str, eps: float) -> torch.Tensor:
    """A norm without its weights, computed in fp32: `"rms"`, `"layer"`, or `"none"`."""
    if kind == "none":
        return h_BTD
    x_BTD = h_BTD.float()
    if kind == "layer":
        x_BTD = x_BTD - x_BTD.mean(-1, keepdim=True)
    return (x_BTD * torch.rsqrt(x_BTD.pow(2).mean(-1, keepdim=True) + eps)).to(h_BTD.dtype)


class SurrogateHook:
    """Runs a layer's `surrogate` on what the layer is given: a forward pre-hook with keyword arguments."""

    def __call__(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        output_BTD = self.run(layer, hidden_BTD)
        return ((output_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": output_BTD})

    def run(self, layer: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The surrogate's output."""
        return layer.surrogate(hidden_BTD)


def find_stages(model: Any) -> list[nn.Sequential]:
    """The stages of a ResNet, each its residual blocks in order."""
    return [stage.layers for stage in model.base_model.encoder.stages]


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The one stack of layers of a model; of a ResNet the residual blocks of all stages, in a list of their own.

    Raises:
        ValueError: If there is none, or several.
    """
    if isinstance(model, ResNetPreTrainedModel):
        return nn.ModuleList(block for stage in find_stages(model) for block in stage)
    count = model.config.get_text_config().num_hidden_layers
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(stacks) != 1:
        raise ValueError(f"model={type(model).__name__} has {len(stacks)} stacks of {count} layers; RepL needs one.")
    return stacks[0]


class FoldedModel:
    """Adds the surrogates to a stock model's layers; mixed in before the model's class by `make_folded_classes`."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        layers = find_layers(self)  # type: ignore[arg-type]
        for index, spec in config.repl["surrogates"].items():
            layer: Any = layers[int(index)]
            layer.surrogate = make_folded(spec)
            layer.register_forward_pre_hook(SurrogateHook(), with_kwargs=True)

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the model as a stock one is saved, with the code that it needs where `lopt_hf` is not imported.

        Args:
            save_directory: Folder of the checkpoint.
            *args: Further arguments of `PreTrainedModel.save_pretrained`.
            push_to_hub: Uploads it too, with its code.
            **kwargs: Likewise, or for the upload.
        """
        self.config.auto_map = {"AutoConfig": "configuration_repl.FoldedRepLConfig"}
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_main_process", True):
            return
        for name in CODE_FILES:
            source, target = Path(__file__).with_name(name), Path(save_directory) / name
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        if push_to_hub:  # not by the stock method, which would upload before the code is there
            hub |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> Any:
        """As the stock model's, but a folded model is there to be used, not to be trained.

        Raises:
            ValueError: If it is set to training.
        """
        if mode:
            raise ValueError(
                f"model={type(self).__name__} is folded: its surrogates are static weights, cut off from their "
                "neighbours. Train the unfolded model and call merge_and_unload() afterwards."
            )
        return super().train(False)  # type: ignore[misc]


def family_classes(architecture: str, prefix: str, model_type: str, mixin: type) -> tuple[type, type]:
    """Subclasses of a stock architecture and its config, known to the auto classes.

    Args:
        architecture: Name of a model class of `transformers`, such as `"LlamaForCausalLM"`.
        prefix: What the names of the subclasses start with.
        model_type: What the subclass of the config calls itself.
        mixin: What the model class adds.

    Raises:
        ValueError: If `transformers` has no such architecture.
    """
    base: Any = getattr(transformers, architecture) if architecture in dir(transformers) else None
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise ValueError(f"architecture={architecture!r} is no model of transformers {transformers.__version__}.")
    base_config: Any = base.config_class
    module = {"__module__": mixin.__module__}
    config_class = type(f"{prefix}{base_config.__name__}", (base_config,), {"model_type": model_type, **module})
    model_class = type(f"{prefix}{architecture}", (mixin, base), {"config_class": config_class, **module})
    for made in (config_class, model_class):  # pickle looks classes up by module and name
        setattr(sys.modules[mixin.__module__], made.__name__, made)
    # Checkpoints are in the stock model's layout: experts packed in memory are apart in a file. A class of another
    # name is not taken for the stock one, and would start the tensors that it misses at random.
    conversions = get_checkpoint_conversion_mapping(architecture) or get_checkpoint_conversion_mapping(
        base_config.model_type
    )
    if conversions is not None:
        register_checkpoint_conversion_mapping(model_class.__name__, conversions, overwrite=True)
    is_causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    auto_class: Any = AutoModelForCausalLM if is_causal else AutoModelForImageClassification
    auto_class.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


@lru_cache
def make_folded_classes(architecture: str, model_type: str) -> tuple[Any, Any]:
    """Makes the folded model's config class and model class, registered with the auto classes.

    Args:
        architecture: Name of a model class of `transformers`.
        model_type: That of `FoldedRepLConfig`.
    """
    return family_classes(architecture, FOLDED_PREFIX, model_type, FoldedModel)


def loadable_classes(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """The architectures of a stock config that `family_classes` makes loadable: language model, image classifier."""
    mappings: Any = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
    return [mapping[config_class] for mapping in mappings if config_class in mapping]


def find_made_class(name: str, prefix: str, make: Any) -> Any:
    """Finds a class that `family_classes` makes by its name: pickle asks for it in a process that has not made it.

    Args:
        name: The class's name.
        prefix: What it starts with.
        make: Makes the classes of an architecture.

    Raises:
        AttributeError: If there is no such class.
    """
    stock = getattr(transformers, name.removeprefix(prefix), None) if name.startswith(prefix) else None
    architectures = [stock.__name__] if isinstance(stock, type) and issubclass(stock, PreTrainedModel) else []
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        architectures = [model_class.__name__ for model_class in loadable_classes(stock)]
    for architecture in architectures:
        made = next((made for made in make(architecture) if made.__name__ == name), None)
        if made is not None:
            return made
    raise AttributeError(f"there is no class {name!r} here.")


def __getattr__(name: str) -> Any:
    return find_made_class(name, FOLDED_PREFIX, lambda architecture: make_folded_classes(architecture, "repl"))
