"""Which residual blocks of a ResNet can be replaced: those that have both of their neighbours in their own stage.

The first block of a stage changes the shape of the feature maps, and no surrogate does. Behind the last one stands the
next stage's first, whose kernels are of another shape.
"""

from itertools import accumulate, pairwise

from transformers import PreTrainedModel

from lopt_hf.repl.choosing import layer_kinds
from lopt_hf.repl.config import CONV_OPERATORS, RepLConfig
from lopt_hf.repl.neighbours import CONVOLUTIONAL
from lopt_hf.repl.placement import Span, check_layers, check_spans, every_kth, named_spans, runs_of

__all__ = ["check_kind", "spans_of"]


def check_kind(config: RepLConfig, model: PreTrainedModel) -> None:
    """Checks that an operator is of a model's kind: convolutional or a transformer.

    Raises:
        ValueError: If it is not.
    """
    family = model.config.model_type
    if (family in CONVOLUTIONAL) == (config.operator in CONV_OPERATORS):
        return
    if family in CONVOLUTIONAL:
        raise ValueError(
            f"operator={config.operator!r} is made of a transformer's layers, which model={type(model).__name__} does "
            "not have; set operator to 'conv'."
        )
    raise ValueError(
        f"operator={config.operator!r} is made of residual blocks of convolutions, which model={type(model).__name__} "
        "does not have; use another operator."
    )


def spans_of(config: RepLConfig, model: PreTrainedModel) -> list[Span] | None:
    """The spans that a config says without data; `None` if it leaves them to the data.

    With `placement="every"` the blocks of a ResNet are counted in each stage from 1 on.

    Args:
        config: Says which.
        model: The model.

    Raises:
        ValueError: If the layers are not fit to be replaced.
    """
    if model.config.model_type not in CONVOLUTIONAL:
        return named_spans(config, layer_kinds(model))
    return _in_stages(config, model.config.depths)  # type: ignore[attr-defined]


def _in_stages(config: RepLConfig, depths: list[int]) -> list[Span]:
    stages = list(pairwise(accumulate(depths, initial=0)))
    if config.layers_to_replace is not None:
        name = f"layers_to_replace={config.layers_to_replace}"
        spans = runs_of(check_layers(config.layers_to_replace, sum(depths)))
    elif config.spans is not None:
        kinds = [f"stage {number}" for number, depth in enumerate(depths) for _ in range(depth)]
        name = f"spans={config.spans}"
        spans = check_spans(config.spans, kinds)  # type: ignore[arg-type]  # text is read by the config
    else:
        return _every_kth(config.every, stages)
    for first, end in spans:
        _check_within(name, first, end, stages)
    return spans


def _every_kth(every: int, stages: list[Span]) -> list[Span]:
    longest = max(stop - start for start, stop in stages)
    if every >= longest:
        fix = f"use at most {longest - 1}." if longest > 2 else "a stage needs three or more; use another model."
        lengths = ", ".join(str(stop - start) for start, stop in stages)
        raise ValueError(
            f"every={every} chooses none of the blocks of stages of {lengths}, whose first and last are kept; {fix}"
        )
    fitting = [(start, stop - start) for start, stop in stages if stop - start > every]
    return runs_of([start + layer for start, depth in fitting for layer in every_kth(depth, every)])


def _check_within(name: str, first: int, end: int, stages: list[Span]) -> None:
    start, stop = next((start, stop) for start, stop in stages if start <= first < stop)
    inner = ", ".join(str(layer) for begin, behind in stages for layer in range(begin + 1, behind - 1))
    allowed = f"choose blocks inside a stage: {inner}" if inner else "use a model with stages of three or more"
    if first == start:
        raise ValueError(
            f"{name}: block {first} is the first of its stage and changes the shape of the feature maps, which no "
            f"surrogate does; {allowed}."
        )
    if end == stop:
        raise ValueError(
            f"{name}: block {end - 1} is the last of its stage, and the kernels of the one behind it are for feature "
            f"maps of another shape; {allowed}."
        )
