"""Where a model's decoder layers are, and how they are cut into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = [
    "Block",
    "DecoderStack",
    "check_architecture",
    "find_decoder_stack",
    "split_layers",
    "untie_output_embeddings",
]

# Decoders whose layers are plain modules, from before `GradientCheckpointingLayer`.
_PLAIN_LAYERS = frozenset({"ctrl", "gpt_neox_japanese", "openai-gpt"})

# Why what looks like a decoder cannot be cut, by its config's `model_type`.
_UNCUT = {
    "cpmant": "one learned position bias feeds all of its layers, so that no block's gradient stays in the block",
    "dory": "its middle layers run several times each, in loops, and not once from the first to the last",
    "hrm_text": "its two stacks of layers run several times each, in turns, and not once from the first to the last",
    "reformer": "its layers are reversible: they make their gradients themselves, where no boundary can stop them",
    "xlm": "its layers are no modules of their own that could be cut, but lists of attentions and of MLPs",
    "xlnet": "it is trained on permutations of the tokens, with two streams of hidden states",
    "zaya": "each layer's router reads what the router before it made, a second way for gradients between layers",
}


@dataclass(frozen=True)
class Block:
    """A contiguous run of decoder layers that learns together: layers `start` to `stop - 1`."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class DecoderStack:
    """The decoder of a causal language model.

    Attributes:
        decoder: The module whose forward runs embeddings, layers and final norm.
        layers: Its decoder layers, in the order in which they run.
        hidden_size: Width of the hidden states between the layers, in channels.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    hidden_size: int


def check_architecture(name: str, text_config: PretrainedConfig) -> None:
    """Raises if a model's architecture is known not to be one stack of layers; its weights need not be loaded.

    Args:
        name: What the model is called in the message.
        text_config: The config of its text decoder.

    Raises:
        ValueError: With the reason.
    """
    reason = _UNCUT.get(text_config.model_type)
    if reason is not None:
        raise ValueError(f"model={name} cannot be trained block by block: {reason}; pass another model.")


def find_decoder_stack(model: PreTrainedModel) -> DecoderStack:
    """Finds the decoder layers of a causal language model by its structure, whatever its attributes are called.

    Args:
        model: A `transformers` causal language model (for a `PeftModel`, pass `get_base_model()`).

    Raises:
        ValueError: If the model is an encoder or an encoder-decoder, or if no or several stacks of layers fit.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"model={name} is an encoder-decoder; local learning needs a decoder-only language model.")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"model={name} has no language-modelling head; load it with `AutoModelForCausalLM` or pass another model."
        )
    text_config = model.config.get_text_config(decoder=True)
    check_architecture(name, text_config)
    decoder = _decoder_of(model)
    layers = _only_stack(name, decoder, text_config)
    if any(vars(module).get("is_causal") is False for module in layers.modules()):
        raise ValueError(f"model={name} attends in both directions (an encoder); pass a causal language model.")
    return DecoderStack(decoder=decoder, layers=layers, hidden_size=text_config.hidden_size)


def _decoder_of(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    # ModernBERT-decoder calls its LM head `decoder`.
    return model.base_model if decoder is model.get_output_embeddings() else decoder


def _only_stack(name: str, decoder: nn.Module, text_config: PretrainedConfig) -> nn.ModuleList:
    layer_type = nn.Module if text_config.model_type in _PLAIN_LAYERS else GradientCheckpointingLayer
    stacks = {
        path: module
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(m, layer_type) for m in module)
    }
    expected = text_config.num_hidden_layers
    fitting = [stack for stack in stacks.values() if len(stack) == expected]
    if not fitting:  # LongCat has two attentions to a layer, and counts them
        fitting = [stack for stack in stacks.values() if len(stack) == vars(text_config).get("num_layers")]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{path!r} of {len(stack)}" for path, stack in stacks.items())
    plain = "" if found else f", and no list of `{GradientCheckpointingLayer.__name__}` by which layers are known"
    raise ValueError(
        f"model={name}: local learning needs one stack of the {expected} decoder layers that its config tells of, "
        f"which run once, one after the other; it has {found or 'none'}{plain}. Pass another model, or report the "
        "architecture."
    )


def split_layers(num_layers: int, num_blocks: int, split_at: Sequence[int] | None = None) -> list[Block]:
    """Cuts `num_layers` decoder layers into blocks.

    Two blocks meet at layer `num_layers // 2` (LoPT paper, Sec. 3); more blocks are even, the first
    `num_layers % num_blocks` of them one layer larger (LoPT code; the paper has two blocks only).

    Args:
        num_layers: Number of decoder layers.
        num_blocks: Number of blocks, at least 2.
        split_at: Index of the first layer of every block but the first, instead of an even split.

    Raises:
        ValueError: If there are fewer than 2 blocks or more blocks than layers, or if `split_at` is not strictly
            increasing within the layers or does not fit `num_blocks`.
    """
    if not 2 <= num_blocks <= num_layers:
        raise ValueError(
            f"num_blocks={num_blocks} does not fit a model with {num_layers} layers; "
            f"choose a number from 2 to {num_layers}."
        )
    if split_at is None:
        cuts = _even_cuts(num_layers, num_blocks)
    else:
        cuts = list(split_at)
        if len(cuts) != num_blocks - 1:
            raise ValueError(
                f"split_at={cuts} cuts the layers into {len(cuts) + 1} blocks, but num_blocks={num_blocks}; "
                f"give {num_blocks - 1} indices or set num_blocks to {len(cuts) + 1}."
            )
        if any(later <= earlier for earlier, later in zip([0, *cuts], [*cuts, num_layers], strict=True)):
            raise ValueError(
                f"split_at={cuts} must be strictly increasing layer indices from 1 to {num_layers - 1} "
                f"for a model with {num_layers} layers."
            )
    edges = [0, *cuts, num_layers]
    return [Block(i, start, stop) for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True))]


def _even_cuts(num_layers: int, num_blocks: int) -> list[int]:
    if num_blocks == 2:
        return [num_layers // 2]
    size, remainder = divmod(num_layers, num_blocks)
    return [i * size + min(i, remainder) for i in range(1, num_blocks)]


def untie_output_embeddings(model: PreTrainedModel) -> bool:
    """Gives the LM head a weight of its own if it shares the input embedding's (LoPT paper, Sec. 3, and code).

    Without it the task gradient would reach the input embedding, which belongs to the first block, through the head.
    The config says so (`tie_word_embeddings=False`), so that the saved checkpoint loads as it was trained.

    Returns:
        Whether the weights had been tied.

    Raises:
        ValueError: If an adapter keeps them tied.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head.weight is not embeddings.weight:
        return False
    if "weight" not in dict(head.named_parameters(recurse=False)):  # a wrapper, which PEFT ties anew when it loads it
        raise ValueError(
            "ensure_weight_tying=True makes one weight of the adapter's input embedding and LM head, which belong to "
            "the first and to the last block; leave it out, so that each learns for itself, or set tied_embeddings to "
            "'freeze'."
        )
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.get_text_config(decoder=True).tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    _untie_bias(model, head)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
    return True


def _untie_bias(model: PreTrainedModel, head: Any) -> None:
    """Gives the other name of an LM head's bias a tensor of its own; only checkpoints have it (BERT).

    The config unties it with the weight, so that loading expects both, while of a shared tensor one name is saved.
    """
    bias = vars(head).get("_parameters", {}).get("bias")
    if bias is None:
        return
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is bias and module is not head:
                setattr(module, name, nn.Parameter(bias.detach().clone(), requires_grad=False))
