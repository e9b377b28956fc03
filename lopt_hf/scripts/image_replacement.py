"""RepL in `lopt-hf image`: layers of a ViT replaced by surrogates before training, or removed to compare with."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lopt_hf.common.settings import check_at_least, check_choice, option
from lopt_hf.repl.choosing import layer_kinds
from lopt_hf.repl.config import RepLConfig
from lopt_hf.repl.model import get_repl_model
from lopt_hf.repl.placement import named_spans
from lopt_hf.repl.surgery import remove_layers

__all__ = ["ReplacementArguments", "replace_layers"]

REMOVAL = "removal"
# The paper's, and our linear map
OPERATORS = ("proj", "head", "mlp", "head+mlp", "linear", REMOVAL)


@dataclass
class ReplacementArguments:
    """What `method="repl"` replaces, and by what (RepL, arXiv 2605.19533).

    Parameters:
        operator: The surrogate: `"proj"`, `"head"`, `"mlp"` or `"head+mlp"` of the paper, which starts from half of
            each neighbour's weights, our `"linear"`, or `"removal"`: nothing in the layers' place, to compare with.
        replace_every: Every K-th layer is replaced, the last one never. Paper: 4.
    """

    operator: str = option(
        "head+mlp",
        "With method=repl: 'proj', 'head', 'mlp', 'head+mlp' (paper), 'linear', or 'removal': nothing in their place.",
        OPERATORS,
    )
    replace_every: int = option(4, "With method=repl: replace every K-th layer (paper: 4).")

    def __post_init__(self) -> None:
        check_choice("operator", self.operator, OPERATORS)
        check_at_least("replace_every", self.replace_every, 2)

    def check_unused(self, method: str) -> None:
        """Raises `ValueError` if a method that replaces nothing is told what to replace."""
        for name in ("operator", "replace_every"):
            value = getattr(self, name)
            if value != ReplacementArguments.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value!r} does nothing with method={method!r}; set method to 'repl'.")


def replace_layers(model: PreTrainedModel, arguments: ReplacementArguments) -> Any:
    """Replaces or removes layers of a ViT, in place.

    Args:
        model: The model.
        arguments: Which layers, and by what.

    Raises:
        ValueError: If the model is of another architecture.
    """
    if model.config.model_type != "vit":
        raise ValueError(
            f"method='repl' replaces layers of ViT, not of {type(model).__name__}; the paper's convolutional operator "
            "is not implemented. Choose architecture='vit' or another method."
        )
    operator = "linear" if arguments.operator == REMOVAL else arguments.operator
    config = RepLConfig(operator=operator, placement="every", every=arguments.replace_every, init="paper")
    if arguments.operator != REMOVAL:
        return get_repl_model(model, config)
    spans = named_spans(config, layer_kinds(model)) or []
    remove_layers(model, [layer for first, end in spans for layer in range(first, end)])
    return model
