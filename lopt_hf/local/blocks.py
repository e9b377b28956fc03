"""Where a model's decoder layers are, and how they are cut into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = [
    "Block",
    "DecoderStack",
    "find_decoder_stack",
    "split_layers",
    "untie_output_embeddings",
]


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
    decoder = model.get_decoder()
    text_config = model.config.get_text_config(decoder=True)
    stacks = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == text_config.num_hidden_layers
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"model={name} has {len(stacks)} stacks of {text_config.num_hidden_layers} decoder layers, not one; "
            "local learning needs a model with a single stack of decoder layers."
        )
    if any(vars(module).get("is_causal") is False for module in stacks[0].modules()):
        raise ValueError(f"model={name} attends in both directions (an encoder); pass a causal language model.")
    return DecoderStack(decoder=decoder, layers=stacks[0], hidden_size=text_config.hidden_size)


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
            f"num_blocks={num_blocks} does not fit a model with {num_layers} decoder layers; "
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
                f"for a model with {num_layers} decoder layers."
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
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
    return True
