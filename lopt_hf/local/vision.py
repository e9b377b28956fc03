"""Vision towers: frozen, or trained in the first block, which everything that sees belongs to."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lopt_hf.local.blocks import Block
from lopt_hf.local.ownership import modules_before_decoder, parameters_before_decoder
from lopt_hf.local.schedule import ReachSchedule
from lopt_hf.local.stacks import DecoderStack

__all__ = ["check_deepstack", "num_deepstack_layers", "prepare_vision"]


def prepare_vision(model: PreTrainedModel, stack: DecoderStack, settings: Any, has_adapters: bool) -> str:
    """Freezes what sees, or checks that it can be trained.

    Args:
        model: The model.
        stack: Its decoder.
        settings: The method's arguments.
        has_adapters: Whether there may be adapters on it.

    Returns:
        What the user must know of it; empty if nothing.

    Raises:
        ValueError: If `train_vision` is set and there is nothing of the kind to train.
    """
    vision = parameters_before_decoder(model, stack)
    trainable = [parameter for parameter in vision.values() if parameter.requires_grad]
    name = type(model).__name__
    if settings.train_vision and not vision:
        raise ValueError(f"train_vision=True: {name} has no vision tower; leave train_vision out.")
    if settings.train_vision and not trainable:
        raise ValueError(
            f"train_vision=True: nothing of the vision tower of {name} is trainable, as with an adapter on the "
            "language model only; put an adapter on the tower too, unfreeze it, or set train_vision to False."
        )
    if settings.train_vision or not trainable:
        return ""
    for parameter in trainable:
        parameter.requires_grad_(False)
    return _describe_frozen(model, stack, vision, has_adapters)


def _describe_frozen(
    model: PreTrainedModel, stack: DecoderStack, vision: dict[str, nn.Parameter], has_adapters: bool
) -> str:
    modules = ", ".join(modules_before_decoder(model, stack))
    number = sum(parameter.numel() for parameter in vision.values())
    adapters = ", adapters on them included," if has_adapters else ""
    return (
        f"train_vision=False: the vision tower and projector of {type(model).__name__} ({modules}; "
        f"{number:,} parameters){adapters} are frozen; set train_vision to True to train them with the first block."
    )


def num_deepstack_layers(config: PretrainedConfig) -> int:
    """How many of the first layers the decoder adds image features behind, from inside of the vision tower.

    Qwen3-VL does so (DeepStack, arXiv 2406.04334): these layers' outputs depend on the tower beside their input.
    """
    vision_config = getattr(config, "vision_config", None)
    return len(getattr(vision_config, "deepstack_visual_indexes", None) or ())


def check_deepstack(model: PreTrainedModel, blocks: Sequence[Block], settings: Any) -> None:
    """Raises if image features that come in behind the first layers would cross a cut.

    Args:
        model: The model.
        blocks: The cut of its decoder.
        settings: The method's arguments.

    Raises:
        ValueError: If they would; the message names the option to change.
    """
    number, first = num_deepstack_layers(model.config), blocks[0]
    if number == 0:
        return
    adds = f"{type(model).__name__} adds image features behind its first {number} layers"
    if settings.train_vision and first.stop <= number:
        raise ValueError(
            f"train_vision=True: {adds}, so the loss of a later block than the first (layers 0 to "
            f"{first.stop - 1}) would reach the vision tower; give the first block {number + 1} layers or more by "
            "split_at or a lower num_blocks, or set train_vision to False."
        )
    schedule: ReachSchedule = settings.schedule
    reached = blocks[-schedule.highest : -1] if schedule.highest > 1 else []
    if settings.reach_recompute and reached and reached[0].start < number:
        raise ValueError(
            f"reach_recompute=True: {adds}, which a block that runs again by itself would miss; set "
            "reach_recompute to False, or let task_reach leave these layers out."
        )
