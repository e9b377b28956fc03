"""One stage's part of an image classifier.

The model's own forward runs on every stage, as a language model's does: layers of other stages hand on what they are
given, and so do the embeddings, so that nothing is computed before the stage's first layer. What a stage is made of is
taken out of the whole model in place, so that whoever has found its layers before (a boundary) goes on with them.
"""

from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.methods.image.calls import ImageCalls
from lopt_hf.local.ownership import feeds_first_layer
from lopt_hf.local.stacks import DecoderStack
from lopt_hf.local.stand_ins import PixelsAsHidden
from lopt_hf.pipeline.runtime.stage import Absent, PassThrough, save_on_every_rank
from lopt_hf.pipeline.runtime.stage_plan import StagePlan

__all__ = ["check_stage_model", "keep_image_stage"]


def check_stage_model(model: PreTrainedModel, stack: DecoderStack) -> None:
    """Raises `ValueError` if the layers of an image classifier cannot run on several stages.

    Args:
        model: The whole model.
        stack: Its layers.
    """
    if not ImageCalls(model, stack).is_plain:
        raise ValueError(
            f"model={type(model).__name__}: its layers are called with more than hidden states (the size of the "
            "image, or position biases), which a stage does not have; pass a ViT, DeiT, DINOv2 or ResNet, or train it "
            "in one process with `lopt-hf image`."
        )


def keep_image_stage(model: PreTrainedModel, stack: DecoderStack, plan: StagePlan) -> None:
    """Takes everything out of a whole image classifier that one stage does not run.

    Args:
        model: The image classifier.
        stack: Its layers.
        plan: The stage.

    Raises:
        ValueError: If the model has parameters of which it is not known to which stage they belong.
    """
    for layer in [*stack.layers[: plan.start], *stack.layers[plan.stop :]]:
        _empty(layer)
    layers = set(stack.layers)
    for name, module in list(stack.decoder.named_children()):
        if not layers & set(module.modules()) and any(True for _ in module.parameters()):
            is_before = feeds_first_layer(stack, name)
            if not (plan.is_first if is_before else plan.is_last):
                setattr(stack.decoder, name, PixelsAsHidden(model.dtype) if is_before else Absent())
    for name, module in list(model.named_children()):
        if not plan.is_last and stack.decoder not in set(module.modules()):
            setattr(model, name, Absent())
    save_on_every_rank(model)
    _check_only_own(model, stack)


def _empty(layer: nn.Module) -> None:
    """Makes a layer, whoever holds it, one that hands on what it is given."""
    own = [layer.named_children(), layer.named_parameters(recurse=False), layer.named_buffers(recurse=False)]
    for name in [name for part in own for name, _ in part]:
        delattr(layer, name)
    layer.__class__ = PassThrough


def _check_only_own(model: PreTrainedModel, stack: DecoderStack) -> None:
    beside = [name for name, _ in model.named_parameters(recurse=False)]
    beside += [name for name, _ in stack.decoder.named_parameters(recurse=False)]
    if beside:
        raise ValueError(
            f"model={type(model).__name__} has {beside[0]!r} outside its layers, embeddings and classifier, and no "
            "stage of a pipeline would hold it; train this model in one process with `lopt-hf image`."
        )
