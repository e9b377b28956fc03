"""MLAAN of image classifiers: windows of blocks, and auxiliaries that leap to deeper layers (arXiv 2406.16633).

Where widths differ (ResNet, Swin) an auxiliary leaps to the layers that change them, in their order, and to the last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lopt_hf.common.settings import check_left_out, option
from lopt_hf.local.blocks import Block
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.layer_calls import LayerCall
from lopt_hf.local.methods.base import Learner
from lopt_hf.local.methods.image.calls import ImageCalls
from lopt_hf.local.methods.image.heads import ModelTail, has_one_shape, layer_shapes, make_classifier
from lopt_hf.local.methods.image.method import ImageMethod, check_engine, check_image_options
from lopt_hf.local.methods.image.objectives import AuxiliaryObjective
from lopt_hf.local.methods.mlaan.arguments import MLAANSettings
from lopt_hf.local.methods.mlaan.auxiliary import LeapAuxiliary
from lopt_hf.local.methods.mlaan.leaps import check_leaps, even_leaps, last_leaps, leap_counts
from lopt_hf.local.methods.mlaan.method import MLAAN
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.local.run_facts import RunFacts
from lopt_hf.local.windows import WindowBoundary

__all__ = ["ImageAuxiliary", "ImageMLAAN", "ImageMLAANArguments"]


@dataclass
class ImageMLAANArguments(MLAANSettings):
    """Arguments of MLAAN of image classifiers: see `MLAANSettings`, whose defaults for language models are these.

    Parameters:
        translator: `"none"`, as in the paper.
        readout: The classifiers of the local losses: `"trainable"` ones of each block's own (paper), or the model's
            own `"frozen"` as at the start, where all layers have one width.
        leap: Which deeper layers: `"even"` spreads them over those that follow (paper), `"last"` takes the last ones.
            Those that change the width, and the last one, are always among them.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    translator: str = option("none", "'none', as in the paper.", ["none"])
    readout: str = option(
        "trainable",
        "Classifiers of the local losses: 'trainable' ones of each block's own (paper), or the model's own 'frozen' "
        "as at the start.",
        ["trainable", "frozen"],
    )
    leap: str = option(
        "even", "Which deeper layers: 'even' over those that follow (paper), or the 'last' ones.", ["even", "last"]
    )

    def make_method(self) -> "ImageMLAAN":
        return ImageMLAAN()

    def check(self) -> None:
        super().check()
        check_image_options(self)
        check_left_out(self, ("calibration_tokens",), "does nothing for an image classifier; leave it out.")

    def check_run(self, run: RunFacts) -> None:
        check_engine(run)
        super().check_run(run)


class ImageAuxiliary(LeapAuxiliary):
    """Copies of deeper layers, and the classifiers behind them and on the block's own output.

    Args:
        *args: Those of `LeapAuxiliary`.
        readout: The classifier behind the copies; `None` where one is shared.
        independent: The classifier of the block's own output; likewise.
        **kwargs: Those of `LeapAuxiliary`.
    """

    def __init__(self, *args: Any, readout: nn.Module | None, independent: nn.Module | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.readout = readout
        self.independent = independent

    def forward(self, h_BTD: torch.Tensor, calls: Mapping[int, LayerCall]) -> torch.Tensor:
        """As the parent's, but a tensor of its own without leaps too: the objective tells the two losses by that."""
        output_BTD: torch.Tensor = super().forward(h_BTD, calls)
        return output_BTD.view_as(output_BTD) if output_BTD is h_BTD else output_BTD


class _ImageWindows(WindowBoundary):
    """Windows over layers that are called with hidden states and what follows from the image's size.

    Args:
        *args: Those of `WindowBoundary`.
        calls: How the layers are called.
        **kwargs: Those of `WindowBoundary`.
    """

    def __init__(self, *args: Any, calls: ImageCalls, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._image_calls = calls

    def record_calls(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[int, LayerCall]:
        return self._image_calls.of(args, kwargs)


class ImageMLAAN(ImageMethod, MLAAN):
    """MLAAN of an image classifier (https://huggingface.co/papers/2406.16633)."""

    def make_objective(self, learner: Learner) -> LocalObjective:
        settings: ImageMLAANArguments = learner.settings
        if settings.readout == "trainable":
            return AuxiliaryObjective()
        if not has_one_shape(layer_shapes(learner.base_model, learner.stack)):
            raise ValueError(
                f"readout='frozen' does not work with model={type(learner.base_model).__name__}, whose layers hand on "
                "hidden states of several shapes; set it to 'trainable'."
            )
        return AuxiliaryObjective(ModelTail(learner.base_model, learner.stack).requires_grad_(False))

    def make_heads(self, learner: Learner, objective: LocalObjective) -> LocalHeads:
        settings: ImageMLAANArguments = learner.settings
        if settings.window == len(learner.blocks):
            return super().make_heads(learner, objective)
        shapes = layer_shapes(learner.base_model, learner.stack)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(learner.seed)
            made = {
                block.index: self._make_auxiliary(learner, block, leaps, shapes, objective)
                for block, leaps in zip(learner.blocks, _leaps(learner, shapes), strict=False)
            }
        if isinstance(objective, AuxiliaryObjective) and objective.tail is not None:
            made[0].readout = objective.tail  # so that a checkpoint has its weights
        heads = LocalHeads(made, learner.base_model)
        heads.train()
        return heads

    def _make_auxiliary(
        self, learner: Learner, block: Block, leaps: Sequence[int], shapes: list[torch.Size], objective: LocalObjective
    ) -> ImageAuxiliary:
        settings: ImageMLAANArguments = learner.settings
        own: list[nn.Module | None] = [None, None]
        if isinstance(objective, AuxiliaryObjective) and objective.tail is None:
            last = leaps[-1] if leaps else block.stop - 1
            model, stack = learner.base_model, learner.stack
            own[0] = make_classifier(model, stack, shapes, last)
            if settings.independent_weight:
                own[1] = make_classifier(model, stack, shapes, block.stop - 1)
        return ImageAuxiliary(
            learner.base_model,
            learner.stack.layers,
            leaps,
            averaged=leaps[:1] if settings.ema_layers == "first" else leaps,
            combine="mean" if settings.combine == "mean" else "sum",
            hidden_size=learner.stack.hidden_size,
            checkpointing=settings.auxiliary_checkpointing,
            readout=own[0],
            independent=own[1],
        )

    def make_boundary(self, learner: Learner, objective: LocalObjective, heads: LocalHeads) -> WindowBoundary:
        settings: ImageMLAANArguments = learner.settings
        return _ImageWindows(
            learner.base_model,
            learner.blocks,
            objective,
            heads,
            window=settings.window,
            weights=settings.loss_weights,
            task_share=settings.task_share,
            early_blocks=learner.early_blocks,
            calls=ImageCalls(learner.base_model, learner.stack),
        )


def _leaps(learner: Learner, shapes: list[torch.Size]) -> list[list[int]]:
    """The leapt layers of each early block.

    Raises:
        ValueError: If those that are asked for cannot follow the block.
    """
    settings: ImageMLAANArguments = learner.settings
    given, blocks = settings.leap_layers, learner.blocks
    if given is not None:
        check_leaps(given, blocks)
    entries: Any = leap_counts(blocks, settings.leap_share) if given is None else given
    leaps = any(entry not in (0, []) for entry in entries)
    if leaps and not ImageCalls(learner.base_model, learner.stack).depends_on_size:
        raise ValueError(
            "MLAAN's auxiliaries cannot leap in this model, whose layers are told more than hidden states and the "
            "size of the image, such as position biases that they share (BEiT with use_shared_relative_position_bias)"
            "; set leap_layers to a list with a 0 for each early block."
        )
    return [
        _leaps_behind(block, entry, shapes, given is not None, settings.leap)
        for block, entry in zip(blocks[:-1], entries, strict=True)
    ]


def _leaps_behind(block: Block, entry: Any, shapes: list[torch.Size], is_given: bool, rule: str) -> list[int]:
    stop, num_layers = block.stop, len(shapes)
    if entry in (0, []):
        return []
    changing = [i for i in range(stop, num_layers) if shapes[i] != shapes[i - 1]]
    needed = sorted({*changing, num_layers - 1})
    if isinstance(entry, list):
        missing = [index for index in needed if index not in entry]
        if missing:
            raise ValueError(
                f"leap_layers={entry} of block {block.index} leaves out layer {missing[0]}, which changes the width "
                f"of the feature maps or is the last; {needed} have to be among them."
            )
        return entry
    if is_given and entry < len(needed):
        raise ValueError(
            f"leap_layers={entry} of block {block.index} is too few: layers {needed} change the width or are the "
            f"last; raise it to {len(needed)}, or give 0."
        )
    others = [index for index in range(stop, num_layers) if index not in needed]
    more = max(0, entry - len(needed))
    if not changing:  # as with language models
        return last_leaps(num_layers, entry) if rule == "last" else even_leaps(stop, num_layers, entry)
    chosen = others[len(others) - more :] if rule == "last" else [others[i] for i in even_leaps(0, len(others), more)]
    return sorted([*needed, *chosen])
