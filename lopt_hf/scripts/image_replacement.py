"""RepL in `lopt-hf image`: layers of a ViT or ResNet replaced by surrogates before training, or just removed."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lopt_hf.common.settings import check_at_least, check_choice, option
from lopt_hf.repl.config import RepLConfig
from lopt_hf.repl.mapping import get_repl_model
from lopt_hf.repl.stages import spans_of
from lopt_hf.repl.surgery import remove_layers

__all__ = ["ReplacementArguments", "replace_layers"]

REMOVAL = "removal"
# The paper's, and our linear map
OPERATORS = ("proj", "head", "mlp", "head+mlp", "conv", "linear", REMOVAL)
# By family: the paper's full operator, and its K for ViT; ours for ResNet, of whose stages of three every 4th is none
DEFAULTS = {"vit": ("head+mlp", 4), "resnet": ("conv", 2)}


@dataclass
class ReplacementArguments:
    """What `method="repl"` replaces, and by what (RepL, arXiv 2605.19533).

    Parameters:
        operator: The surrogate: `"proj"`, `"head"`, `"mlp"` or `"head+mlp"` of the paper for ViT, `"conv"` for ResNet,
            which start from half of each neighbour's weights, our `"linear"` for ViT, or `"removal"`: nothing in the
            layers' place, to compare with. Default: `"head+mlp"`, for ResNet `"conv"`.
        replace_every: Every K-th layer is replaced, the last one never; of a ResNet every K-th of each stage. Paper:
            4. Default: that, and for ResNet 2 (ours: its stages may have three layers).
    """

    operator: str | None = option(
        None,
        "With method=repl: 'proj', 'head', 'mlp', 'head+mlp' (paper, the default) or 'linear' of a ViT, 'conv' "
        "(paper) of a ResNet, or 'removal': nothing in their place.",
        OPERATORS,
    )
    replace_every: int | None = option(
        None, "With method=repl: replace every K-th layer; default: 4 (paper), of a ResNet every 2nd of each stage."
    )

    def __post_init__(self) -> None:
        if self.operator is not None:
            check_choice("operator", self.operator, OPERATORS)
        check_at_least("replace_every", self.replace_every, 2)

    def check_unused(self, method: str) -> None:
        """Raises `ValueError` if a method that replaces nothing is told what to replace."""
        for name in ("operator", "replace_every"):
            value = getattr(self, name)
            if value is not None:
                raise ValueError(f"{name}={value!r} does nothing with method={method!r}; set method to 'repl'.")


def replace_layers(model: PreTrainedModel, arguments: ReplacementArguments) -> Any:
    """Replaces or removes layers of a ViT or ResNet, in place.

    Args:
        model: The model.
        arguments: Which layers, and by what.

    Raises:
        ValueError: If the model is of another architecture, or has no such layers.
    """
    family = model.config.model_type
    if family not in DEFAULTS:
        raise ValueError(
            f"method='repl' replaces layers of ViT and ResNet, not of {type(model).__name__}; choose another method."
        )
    operator, every = DEFAULTS[family]
    is_removal = arguments.operator == REMOVAL
    if arguments.operator is not None and not is_removal:
        operator = arguments.operator
    config = RepLConfig(operator=operator, placement="every", every=arguments.replace_every or every, init="paper")
    try:
        spans = spans_of(config, model) or []
    except ValueError as error:  # begins with "every=", which is called otherwise here
        raise ValueError(f"replace_{error}") from error
    if not is_removal:
        return get_repl_model(model, config)
    remove_layers(model, [layer for first, end in spans for layer in range(first, end)])
    return model
