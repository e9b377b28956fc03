"""How a stock model gets its surrogates: `get_repl_model`, PEFT's `get_peft_model` of RepL."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedModel

from lopt_hf.repl.calibration_data import check_lengths, make_batches
from lopt_hf.repl.choosing import (
    check_count,
    check_enough_tokens,
    check_operator,
    check_refit_behind,
    choose_spans,
    layer_kinds,
)
from lopt_hf.repl.config import RepLConfig
from lopt_hf.repl.configuration_repl import FoldedRepLConfig
from lopt_hf.repl.fitting import calibrate
from lopt_hf.repl.model import (
    RepLModel,
    change_config_class,
    cost_of_layers,
    freeze_stock_weights,
    make_classes,
    put_surrogate,
    read_neighbours,
)
from lopt_hf.repl.modeling_repl import find_layers, loadable_classes
from lopt_hf.repl.neighbours import check_family
from lopt_hf.repl.operator_base import Operator
from lopt_hf.repl.operators import make_operator
from lopt_hf.repl.placement import Span
from lopt_hf.repl.stages import check_kind, spans_of
from lopt_hf.repl.surgery import remove_layers

__all__ = ["get_repl_model"]


def get_repl_model(
    model: PreTrainedModel, config: RepLConfig, calibration_data: Any = None, processing_class: Any = None
) -> Any:
    """Replaces layers of a pretrained model by surrogates of their neighbours, in place.

    Args:
        model: A `transformers` causal language model of a supported family, a `ViTForImageClassification`, or, with
            `operator="conv"`, a `ResNetForImageClassification`; no other head, and no subclass of one's own.
        config: Which layers, and by what.
        calibration_data: Texts, a data set, or batches of model inputs; needed by `init="calibrate"` and by every
            placement but `"every"`, see `make_batches`.
        processing_class: The tokenizer, where the data are text.

    Returns:
        The model, now also a `RepLModel`.

    Raises:
        ValueError: If the model, the layers or the data do not fit, or if an option has no effect; the message names
            field, value and fix.

    Example:

    ```python
    config = RepLConfig(num_layers_to_replace=4)
    model = get_repl_model(model, config, calibration_data=texts, processing_class=tokenizer)
    ```
    """
    _check_model(model)
    classes = make_classes(type(model).__name__)  # which can fail, so before weights are changed
    check_kind(config, model)
    config.check_idle()
    layers, family = find_layers(model), model.config.model_type
    spans = spans_of(config, model)  # before the data are run through the model
    if spans is None:
        check_count(config, layer_kinds(model))
        check_operator(config, model)
    check_refit_behind(config, model)
    batches = make_batches(calibration_data, processing_class, config) if config.needs_calibration_data else []
    check_lengths(batches, model.config)
    check_enough_tokens(config, model, batches)
    read = partial(read_neighbours, layers, config=model.config, family=family, settings=config)
    fitted: dict[Span, Operator] = {}
    if spans is None:
        spans, fitted = choose_spans(model, config, batches, partial(_surrogate_of, config, read))
    neighbours = {(first, end): read(first - 1, end) for first, end in spans}
    operators = fitted or {span: make_operator(config, *beside) for span, beside in neighbours.items()}
    if not fitted:
        _initialise(model, config, operators, neighbours, batches)
    return _replace(model, classes, config, spans, operators, neighbours)


def _check_model(model: PreTrainedModel) -> None:
    if isinstance(model, RepLModel) or model.config.model_type == FoldedRepLConfig.model_type:
        raise ValueError(f"model={type(model).__name__} already has surrogates; start from the stock model.")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model={type(model).__name__} is no model of transformers; replace layers first and add adapters then."
        )
    if model.config.to_dict().get("quantization_config") is not None:
        raise ValueError(f"model={type(model).__name__} is quantised; load it without quantisation.")
    check_family(model.config)
    _check_architecture(model)


def _check_architecture(model: PreTrainedModel) -> None:
    """Checks that a model can be loaded again: auto classes know surrogates in some of the stock classes alone."""
    loadable = loadable_classes(CONFIG_MAPPING[model.config.model_type])
    if type(model) not in loadable:
        names = " or ".join(model_class.__name__ for model_class in loadable)
        raise ValueError(f"model={type(model).__name__} could not be loaded again with surrogates; use a {names}.")


def _surrogate_of(config: RepLConfig, read: Any, span: Span) -> tuple[Operator, tuple[Any, Any]]:
    """The surrogate that a span is tried with: of `refit` the smaller map, which takes less memory for all spans."""
    beside = read(span[0] - 1, span[1])
    tried = replace(config, operator="down_proj") if config.operator == "refit" else config
    return make_operator(tried, *beside), beside


def _initialise(model: Any, config: RepLConfig, operators: Any, neighbours: Any, batches: Any) -> None:
    if config.init == "calibrate":
        calibrate(model, operators, neighbours, batches, config.ridge, config.refit_behind)
        return
    for span, operator in operators.items():
        if config.init == "paper":
            operator.start_as_paper(*neighbours[span])
        else:
            operator.start_as_skip()


def _replace(
    model: Any, classes: tuple[Any, Any], config: RepLConfig, spans: Sequence[Span], operators: Any, neighbours: Any
) -> Any:
    architecture, family = type(model).__name__, model.config.model_type
    config_class, model_class = classes
    removed = [layer for first, end in spans for layer in range(first, end)]
    gone = dict(zip(removed, remove_layers(model, removed), strict=True))
    for span in spans:
        put_surrogate(operators[span], *neighbours[span])
    change_config_class(model.config, config_class)
    origin = {"architecture": architecture, "family": family}
    costs = [cost_of_layers([gone[layer] for layer in range(*span)], model.config) for span in spans]
    model.config.repl = {**origin, "removed": removed, "removed_costs": costs, "config": config.to_dict()}
    model.__class__ = model_class
    freeze_stock_weights(model)
    return model
