"""A stock model with some layers replaced, under PEFT's verbs: `RepLModel`, which `get_repl_model` makes of it."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
from transformers.utils import logging

from lopt_hf.common.upstream.torch import forward_pre_hooks
from lopt_hf.repl.config import MLP_OPERATORS, STOCK_OPERATORS, UNFOLDED_MODEL_TYPE, RepLConfig
from lopt_hf.repl.configuration_repl import FoldedRepLConfig
from lopt_hf.repl.convolution import ConvNeighbour
from lopt_hf.repl.folding import fold
from lopt_hf.repl.map_operators import MLPMap
from lopt_hf.repl.modeling_repl import (
    SurrogateHook,
    family_classes,
    find_layers,
    find_made_class,
    make_folded,
    make_folded_classes,
)
from lopt_hf.repl.neighbours import CONVOLUTIONAL, Neighbour
from lopt_hf.repl.operator_base import Operator, SurrogateCost, cost_of, layer_cost
from lopt_hf.repl.operators import make_operator
from lopt_hf.repl.placement import Span, runs_of
from lopt_hf.repl.surgery import PER_LAYER_LISTS, SynthesisHook, attach, attach_in_mlp, kept_index

__all__ = [
    "RepLModel",
    "change_config_class",
    "cost_of_layers",
    "freeze_stock_weights",
    "make_classes",
    "put_surrogate",
    "read_neighbours",
]

logger = logging.get_logger(__name__)

IMAGE_FAMILIES = ("vit", *CONVOLUTIONAL)
HUB_ARGUMENTS = ("revision", "subfolder", "cache_dir", "token", "local_files_only")


class RepLModel:
    """What a stock model gains by `get_repl_model`: it becomes an instance of both.

    It is no wrapper with a forward of its own, so that trainers, `generate` and adapters treat it as the stock model
    that it is. Saved and loaded like any model; `config.json` says which surrogates to put back, and the auto classes
    know it wherever `lopt_hf` is imported.
    """

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        repl, layers = config.repl, find_layers(self)  # type: ignore[arg-type]
        settings = RepLConfig(**repl["config"])
        for _, index in _places(repl["removed"]):
            beside = read_neighbours(layers, index - 1, index, config, repl["family"], settings)
            put_surrogate(make_operator(settings, *beside), *beside)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads an unfolded model that `save_pretrained` or a trainer has saved.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *args: As for the auto classes.
            **kwargs: As for the auto classes.

        Raises:
            ValueError: If it is no RepL model, or a folded one.
        """
        if cls is not RepLModel:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
            model = loaded[0] if kwargs.get("output_loading_info") else loaded
            freeze_stock_weights(model)  # loading makes everything trainable
            return loaded
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if config.model_type != UNFOLDED_MODEL_TYPE:
            folded = config.model_type == FoldedRepLConfig.model_type
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} holds "
                + ("a folded RepL model" if folded else f"a stock model of type {config.model_type!r}")
                + "; load it with AutoModelForCausalLM"
                + ("." if folded else ", and replace layers with get_repl_model.")
            )
        is_image_model = config.repl["family"] in IMAGE_FAMILIES
        auto_class: Any = AutoModelForImageClassification if is_image_model else AutoModelForCausalLM
        return auto_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def surrogates(self) -> dict[int, Operator]:
        """The surrogate for each span, by the number of its first layer in the model it was taken from."""
        layers = find_layers(self)  # type: ignore[arg-type]
        offset = 1 if self.config.repl["config"]["operator"] in MLP_OPERATORS else 0  # in the layer before, or behind
        return {
            first: _surrogate(layers[index - offset]) for (first, _), index in _places(self.config.repl["removed"])
        }

    @property
    def surrogate_costs(self) -> list[SurrogateCost]:
        """What each surrogate costs beside its removed layers."""
        removed = self.config.repl["removed_costs"]
        return [
            cost_of(first, operator, cost)
            for (first, operator), cost in zip(self.surrogates.items(), removed, strict=True)
        ]

    @property
    def hooks(self) -> list[SynthesisHook]:
        """The hooks that run the surrogates in front of layers, from the lowest on."""
        hooks = (hook for layer in find_layers(self) for hook in forward_pre_hooks(layer))  # type: ignore[arg-type]
        return [hook for hook in hooks if isinstance(hook, SynthesisHook)]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trainable parameters, and of all."""
        return self.num_parameters(only_trainable=True), self.num_parameters()  # type: ignore[attr-defined]

    def print_trainable_parameters(self) -> None:
        """Prints the trainable parameters in PEFT's words."""
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything
        print(f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}")

    @torch.no_grad()
    def merge_and_unload(self) -> Any:
        """Folds every surrogate to static weights, in place.

        Returns:
            The same model, set to evaluation. With an operator of `STOCK_OPERATORS` it is of its family's own class
            and loads everywhere. Else it is of an architecture that `AutoModelForCausalLM` loads wherever `lopt_hf`
            is imported, or that `save_with_code` saves for everybody else.

        Raises:
            ValueError: If there are adapters on weights that it folds into.
        """
        self.eval()  # type: ignore[attr-defined]
        repl = self.config.repl
        return _fold_to_stock(self) if repl["config"]["operator"] in STOCK_OPERATORS else _fold_beside(self)


def freeze_stock_weights(model: Any) -> None:
    """Leaves the surrogates alone trainable, where the model was made so."""
    if model.config.repl["config"]["trainable"] == "coefficients":
        model.requires_grad_(False)
        for operator in model.surrogates.values():
            operator.requires_grad_(True)


def _fold_to_stock(model: Any) -> Any:
    layers, repl = find_layers(model), model.config.repl
    operators, settings = model.surrogates, RepLConfig(**repl["config"])
    read = partial(Neighbour, config=model.config, family=repl["family"], detach=settings.detach_sources)
    for (first, _), index in _places(repl["removed"]):
        fold(operators[first], read(layers[index - 1]), [read(layer) for layer in layers[index:]])
    model_class: Any = getattr(transformers, repl["architecture"])
    del model.config.repl
    change_config_class(model.config, model_class.config_class)
    model.__class__ = model_class
    if settings.trainable == "coefficients":  # they have become part of weights that were frozen
        model.requires_grad_(True)
    _warn_of_patterns(model.config.get_text_config())
    return model


def _warn_of_patterns(config: Any) -> None:
    """Warns of runtimes that take a layer's kind from its number, where that is no longer the family's pattern."""
    usual = type(config)(num_hidden_layers=config.num_hidden_layers).to_dict()
    values = config.to_dict()
    for name in PER_LAYER_LISTS:
        kinds = values.get(name) or []
        if len(set(kinds)) > 1 and kinds != usual.get(name):
            logger.warning(
                "%s in config.json says of which kind each layer is that stays. A runtime that takes it from the "
                "layers' numbers instead, as llama.cpp does for SmolLM3 and Gemma 2, runs this model wrongly; there "
                "only whole periods of the pattern can go (of SmolLM3 4 layers).",
                name,
            )


def _fold_beside(model: Any) -> Any:
    layers, repl = find_layers(model), model.config.repl
    if repl["config"]["operator"] == "patch":
        logger.warning(
            "operator='patch' maps the residual stream, which no stock layer does, so the folded model keeps a matrix "
            "of its own: it loads where lopt_hf is imported, or saved by save_with_code. Operators that leave a stock "
            "model are %s.",
            ", ".join(STOCK_OPERATORS),
        )
    folded: dict[str, Any] = {}
    for (_, index), hook in zip(_places(repl["removed"]), model.hooks, strict=True):
        operator = _surrogate(layers[index])
        surrogate = make_folded(operator.spec).to(next(layers[index].parameters()))
        surrogate.load_state_dict(operator.synthesise(hook.previous, hook.following))
        attach(layers[index], surrogate.eval(), SurrogateHook())
        folded[str(index)] = operator.spec
    config_class, model_class = make_folded_classes(repl["architecture"], FoldedRepLConfig.model_type)
    change_config_class(model.config, config_class)
    kept = {name: repl[name] for name in ("architecture", "family", "removed")}
    model.config.repl = {**kept, "surrogates": folded}
    model.__class__ = model_class
    return model


def cost_of_layers(layers: Sequence[nn.Module], config: Any) -> list[int]:
    """Parameters, and multiply-adds per token, of some layers of a model together.

    Args:
        layers: The layers.
        config: The model's.
    """
    per_token = config.get_text_config().to_dict().get("num_experts_per_tok") or 1
    return [sum(values) for values in zip(*(layer_cost(layer, per_token) for layer in layers), strict=True)]


def _places(removed: Sequence[int]) -> list[tuple[Span, int]]:
    """The spans that were removed, each with the number that the layer behind it has now."""
    return [(span, kept_index(span[1], removed)) for span in runs_of(removed)]


def put_surrogate(operator: Operator, previous: Any, following: Any) -> None:
    """Puts a surrogate in its place."""
    if isinstance(operator, MLPMap):
        attach_in_mlp(previous, operator)
    else:
        attach(following.layer, operator, SynthesisHook(previous, following))


def change_config_class(config: Any, config_class: type) -> None:
    """Makes a config, which the model's modules share, one of another class."""
    config.__class__ = config_class
    vars(config).pop("model_type", None)  # a config read from a file has its own beside its class's


def _surrogate(layer: Any) -> Operator:
    surrogate = layer.surrogate
    # PEFT's `modules_to_save` keeps a trainable copy beside the original.
    return surrogate if isinstance(surrogate, Operator) else surrogate.modules_to_save[surrogate.active_adapter]


def read_neighbours(
    layers: nn.ModuleList, previous: int, following: int, config: Any, family: str, settings: RepLConfig
) -> tuple[Any, Any]:
    """Reads the layers before and behind a place in the model, of which a surrogate is made there."""
    read: Any = partial(Neighbour, family=family)
    if family in CONVOLUTIONAL:
        read = ConvNeighbour
    read = partial(read, config=config, detach=settings.detach_sources)
    return read(layers[previous]), read(layers[following])


@lru_cache
def make_classes(architecture: str) -> tuple[Any, Any]:
    """The unfolded model's config class and model class of an architecture, registered with the auto classes."""
    return family_classes(architecture, "RepL", UNFOLDED_MODEL_TYPE, RepLModel)


def __getattr__(name: str) -> Any:
    return find_made_class(name, "RepL", make_classes)
