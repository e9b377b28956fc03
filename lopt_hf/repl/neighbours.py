"""The weights of a surrogate's neighbours, read from the layers of the supported families.

Shapes: D hidden channels, P heads x head size (the width of the concatenated heads), I inner width of the MLP.
A bias that a layer does not have is `None`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

__all__ = [
    "CONVOLUTIONAL",
    "FAMILIES",
    "Affine",
    "MLPWeights",
    "Neighbour",
    "NormWeights",
    "check_family",
    "effective",
]


@dataclass(frozen=True)
class Layout:
    """Where a family keeps the weights of a layer; what is left out is as in LLaMA, but for the gate.

    `mlp` is the module whose output is added to the residual stream, but for a norm behind it. `value` may be packed
    with others; `value_packing` is `"rows"` where query, key and value follow each other,
    `"heads"` where those of each head do.
    """

    attention_norm: str = "input_layernorm"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    mlp: str = "mlp"
    gate: str | None = None
    value_packing: str | None = None
    packs_gate: bool = False
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    norm: str = "rms"
    norm_offset: float = 0.0
    activation: str = "hidden_act"


FAMILIES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "mixtral", "qwen3_moe"), Layout(gate="mlp.gate_proj")
    ),
    "gemma2": Layout(
        gate="mlp.gate_proj",
        mlp_norm="pre_feedforward_layernorm",
        post_attention_norm="post_attention_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
        norm_offset=1.0,
        activation="hidden_activation",
    ),
    "phi3": Layout(value="self_attn.qkv_proj", value_packing="rows", up="mlp.gate_up_proj", packs_gate=True),
    "gpt2": Layout(
        attention_norm="ln_1",
        value="attn.c_attn",
        output="attn.c_proj",
        mlp_norm="ln_2",
        up="mlp.c_fc",
        down="mlp.c_proj",
        value_packing="rows",
        norm="layer",
        activation="activation_function",
    ),
    "gpt_neox": Layout(
        value="attention.query_key_value",
        output="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        value_packing="heads",
        norm="layer",
    ),
    "opt": Layout(
        attention_norm="self_attn_layer_norm",
        output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up="fc1",
        down="fc2",
        mlp="fc2",
        norm="layer",
        activation="activation_function",
    ),
    "vit": Layout(
        attention_norm="layernorm_before",
        value="attention.v_proj",
        output="attention.o_proj",
        mlp_norm="layernorm_after",
        up="mlp.fc1",
        down="mlp.fc2",
        norm="layer",
    ),
}


CONVOLUTIONAL = ("resnet",)  # read by `ConvNeighbour`
EXPERTS = "mlp.experts"  # packed by transformers, `down_proj` is (experts, out, in)


def check_family(config: PretrainedConfig) -> None:
    """Raises if the layers of a model are not of a known layout.

    Raises:
        ValueError: If the family is unknown, or if one of its options changes what a layer computes.
    """
    if config.model_type in CONVOLUTIONAL:
        return
    if config.model_type not in FAMILIES:
        known = ", ".join((*FAMILIES, *CONVOLUTIONAL))
        raise ValueError(f"model_type={config.model_type!r} is not supported by RepL; use one of {known}.")
    options = config.to_dict()
    if options.get("do_layer_norm_before") is False:
        raise ValueError(
            "do_layer_norm_before=False (as in opt-350m) normalises after the branches; use another model."
        )
    if options.get("_remove_final_layer_norm"):
        raise ValueError(
            "_remove_final_layer_norm=True leaves out the norm before the LM head, which takes up a factor on the "
            "hidden states; use another model."
        )
    if options.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError(
            "scale_attn_by_inverse_layer_idx=True scales a layer's attention by its number, which changes when layers "
            "go; use another model."
        )
    if options.get("per_layer_config"):
        raise ValueError("per_layer_config overrides single layers by their number; use a model without overrides.")


@dataclass(frozen=True)
class Affine:
    """A linear map as `w_OI` and `b_O`."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def after(self, first: "Affine") -> "Affine":
        """The map that does `first`, and then this one."""
        return Affine(self.weight @ first.weight, self.bias if first.bias is None else self(first.bias))

    def scaled(self, factors_O: torch.Tensor) -> "Affine":
        """The map whose outputs are multiplied by factors."""
        return Affine(self.weight * factors_O[:, None], None if self.bias is None else self.bias * factors_O)


@dataclass(frozen=True)
class NormWeights:
    """The affine part of a norm."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None

    def into(self, following: Affine) -> Affine:
        """The linear map that does on the plainly normalised input what `following` does on the norm's output."""
        weight = following.weight if self.weight is None else following.weight * self.weight
        return Affine(weight, following.bias if self.bias is None else following(self.bias))


@dataclass(frozen=True)
class MLPWeights:
    """An MLP with its norm; `gate` is `None` where it is not gated."""

    norm: NormWeights
    up: Affine
    gate: Affine | None
    down: Affine
    post_norm: NormWeights | None


def effective(module: Any) -> Affine:
    """Reads the weights of a linear layer or a convolution, with the adapters that are active on it.

    Args:
        module: The layer.

    Returns:
        Its weight as (out, in), of a convolution (out, in, height, width), and its bias.
    """
    if isinstance(module, ModulesToSaveWrapper):
        copies: Any = module.modules_to_save
        module = module.original_module if module.disable_adapters else copies[module.active_adapter]
    adapter = module if isinstance(module, BaseTunerLayer) else None
    base: Any = adapter.get_base_layer() if adapter is not None else module
    is_transposed = isinstance(base, Conv1D)
    own = base.weight.T if is_transposed else base.weight
    weight = own
    if isinstance(adapter, lora.Linear | lora.Conv2d) and not adapter.merged and not adapter.disable_adapters:
        for name in adapter.active_adapters:
            if name in adapter.lora_A:
                delta = adapter.get_delta_weight(name)
                weight = weight + _added(adapter, name, own, delta.T if is_transposed else delta)
    return Affine(weight, base.bias)


def _added(adapter: Any, name: str, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to a weight: with DoRA the sum's rows have lengths of their own."""
    if name not in adapter.lora_magnitude_vector:
        return delta
    summed = weight + delta
    factors_O = adapter.lora_magnitude_vector[name].weight.flatten() / summed.flatten(1).norm(dim=1).detach()
    return summed * factors_O.view(-1, *[1] * (summed.ndim - 1)) - weight


class Neighbour:
    """One of the two layers beside a removed one. Reads; owns nothing.

    Args:
        layer: The layer.
        config: The model's config.
        family: Its key in `FAMILIES`.
        detach: Read the weights as constants.
    """

    def __init__(self, layer: nn.Module, config: PretrainedConfig, family: str, detach: bool = True) -> None:
        self.layer = layer
        self.layout = FAMILIES[family]
        self.detach = detach
        text_config: Any = config.get_text_config()
        self.num_heads: int = text_config.num_attention_heads
        self.activation: str = getattr(text_config, self.layout.activation)
        norm: Any = layer.get_submodule(self.layout.attention_norm)
        self.norm_kind = self.layout.norm
        self.norm_eps: float = norm.variance_epsilon if "variance_epsilon" in vars(norm) else norm.eps

    def _read(self, tensor: Any) -> Any:
        return tensor.detach() if self.detach and tensor is not None else tensor

    def _affine(self, path: str) -> Affine:
        affine = effective(self.layer.get_submodule(path))
        return Affine(self._read(affine.weight), self._read(affine.bias))

    def _norm(self, path: str) -> NormWeights:
        module: Any = self.layer.get_submodule(path)
        weight = self._read(module.weight)
        # By the layout, not by the class: PEFT wraps a norm that learns beside adapters
        bias = self._read(module.bias) if self.layout.norm == "layer" else None
        if weight is not None and self.layout.norm_offset:
            weight = weight + self.layout.norm_offset
        return NormWeights(weight, bias)

    def attention_norm(self) -> NormWeights:
        """Returns the weights of the norm before the attention."""
        return self._norm(self.layout.attention_norm)

    def output(self) -> Affine:
        """The attention's output projection, w_DP."""
        return self._affine(self.layout.output)

    def value(self) -> Affine:
        """The attention's value projection, w_PD: shared value heads are repeated for their query heads."""
        packed = self._affine(self.layout.value)
        width = self.output().weight.shape[1]
        head_size = width // self.num_heads
        rows = self._value_rows(packed.weight, width, head_size)
        bias = None if packed.bias is None else self._value_rows(packed.bias[:, None], width, head_size)[:, 0]
        return Affine(rows, bias)

    def _value_rows(self, packed: torch.Tensor, width: int, head_size: int) -> torch.Tensor:
        if self.layout.value_packing == "heads":
            return packed.view(self.num_heads, 3, head_size, -1)[:, 2].reshape(width, -1)
        own = packed
        if self.layout.value_packing == "rows":
            own = packed[(packed.shape[0] + width) // 2 :]  # queries have `width` rows, keys as many as values
        heads = own.view(own.shape[0] // head_size, head_size, -1)
        return heads.repeat_interleave(self.num_heads // heads.shape[0], dim=0).reshape(width, -1)

    def value_path(self) -> Affine:
        """The attention of a token that attends to itself, on the plainly normalised input: w_DD.

        A norm after the attention (Gemma 2) is left out: it is not linear.
        """
        return self.output().after(self.attention_norm().into(self.value()))

    def mlp(self) -> MLPWeights:
        """Returns the weights of the MLP with its norms.

        Raises:
            ValueError: If it is a mixture of experts.
        """
        layout = self.layout
        if self.experts is not None:
            raise ValueError(
                "The MLP is a mixture of experts, whose mean is none; use an operator without an MLP, such as "
                "'linear' or 'down_proj'."
            )
        up, gate = self._affine(layout.up), None
        if layout.packs_gate:
            gate_rows, up_rows = up.weight.chunk(2)
            gate, up = Affine(gate_rows), Affine(up_rows)
        elif layout.gate is not None:
            gate = self._affine(layout.gate)
        post_norm = None if layout.post_mlp_norm is None else self._norm(layout.post_mlp_norm)
        return MLPWeights(self._norm(layout.mlp_norm), up, gate, self._affine(layout.down), post_norm)

    @property
    def experts(self) -> nn.Module | None:
        """The experts of the MLP; `None` where it is a plain one."""
        return dict(self.layer.named_modules()).get(EXPERTS)

    def mlp_output(self) -> nn.Module:
        """Returns the module whose output is what the MLP adds to the residual stream."""
        return self.layer.get_submodule(self.layout.mlp)

    def down_module(self) -> nn.Module:
        """Returns the last projection of a plain MLP, without adapters."""
        module: Any = self.layer.get_submodule(self.layout.down)
        return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    def down(self) -> Affine:
        """Returns the last projection of a plain MLP, w_DI."""
        return self._affine(self.layout.down)

    @property
    def has_down_bias(self) -> bool:
        """Whether the last projection of the MLP has a bias."""
        return self.experts is None and self.down().bias is not None

    def check_down(self, operator: str, experts: bool = True) -> None:
        """Checks that a linear map behind the MLP can be folded into it.

        Args:
            operator: Which needs it, for the error.
            experts: Whether the MLP may be a mixture of experts.

        Raises:
            ValueError: If it cannot.
        """
        if self.layout.post_mlp_norm is not None:
            raise ValueError(
                f"operator={operator!r} folds a map into the MLP's last projection, but here a norm comes behind it "
                f"({self.layout.post_mlp_norm}); use operator 'scale', 'patch' or 'linear'."
            )
        if self.experts is not None and not experts:
            raise ValueError(
                f"operator={operator!r} fits one MLP's last projection, but here it is a mixture of experts; use "
                "operator 'down_proj'."
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the layer's own weights by name: neighbours must share them."""
        weights = self.layer.state_dict().items()
        return {name: tuple(weight.shape) for name, weight in weights if not name.startswith("surrogate.")}
