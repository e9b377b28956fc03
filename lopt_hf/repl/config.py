"""Arguments of `get_repl_model`."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from lopt_hf.common.settings import check_choices, check_left_out, check_lowest, option

__all__ = [
    "BRANCHES",
    "CHOOSING",
    "CONV_OPERATORS",
    "CUTTING",
    "MAP_OPERATORS",
    "MLP_OPERATORS",
    "OPERATORS",
    "STOCK_OPERATORS",
    "UNFOLDED_MODEL_TYPE",
    "RepLConfig",
    "init_of",
]

UNFOLDED_MODEL_TYPE = "repl_unfolded"  # in the config.json of a model whose surrogates still follow their neighbours

STOCK_OPERATORS = ("down_proj", "refit", "scale")  # folded, the model is of its family's own class
MLP_OPERATORS = ("down_proj", "refit")  # they sit in the MLP before the span
MAP_OPERATORS = (*STOCK_OPERATORS, "patch")  # they read no weights of the neighbours
OPERATORS = ("linear", "branches", "proj", "head", "mlp", "head+mlp", *MAP_OPERATORS)  # of transformers
CONV_OPERATORS = ("conv",)  # of convolutional networks
PLACEMENTS = ("block_influence", "every", "influence", "span")
SPAN_CRITERIA = ("error", "influence", "angle")
INITS = ("calibrate", "paper", "skip")
COEFFICIENTS = ("channel", "head", "scalar")
BRANCHES = ("identity", "value", "output", "mlp")
TRAINABLE = ("all", "coefficients")
CHOOSING = ("placement", "every")
CUTTING = ("calibration_tokens", "calibration_seed", "calibration_seq_length", "calibration_batch_size")
_SMALLEST = {
    "every": 2,
    "calibration_tokens": 1,
    "calibration_seq_length": 2,
    "calibration_batch_size": 1,
    "refit_behind": 0,
    "calibration_seed": 0,
}


@dataclass
class RepLConfig:
    """Which layers are replaced, by what, and how the surrogates start.

    Source: RepL, arXiv 2605.19533 ("paper"), which has no code. What goes beyond it is marked "ours". A span is a run
    of adjacent layers that one surrogate replaces.

    Parameters:
        operator: What stands in a layer's place. `"proj"`, `"head"`, `"mlp"`, `"head+mlp"`: the paper's (Eq 19-21,
            22-24, 25-27, and both in sequence). `"branches"` (ours): the span of `branches`, folded to one d x d map.
            `"linear"` (ours): one residual d x d map on the normed input, whose start is synthesised from the
            neighbours. Four more leave the neighbours' weights out of it; the first three fold into the weights of a
            model of the family's own class. `"down_proj"`: a linear map of the MLP output before the span (ReplaceMe,
            arXiv 2505.02819: least squares). `"refit"` (ours): that layer's whole `down_proj` anew, by the same
            regression on its inputs. `"scale"`: one factor, the growth of the hidden states over the span (Prune&Comp,
            arXiv 2507.18212). `"patch"`: a factor for each channel of rotated hidden states (LinearPatch, arXiv
            2505.24680), which no stock layer can hold. `"conv"` (paper) is for a ResNet: one convolution in place of a
            residual block, see `Convolution`; it has no calibration, so `init` is `"paper"` or `"skip"`, and its
            blocks are named or `"every"` K-th of each stage.
        placement: `"block_influence"` (ours): the layers that change their input least, no two of them adjacent,
            on a quarter of the calibration data. `"every"` (paper): layers K, 2K, ... counted from 1, the last layer
            kept; of a ResNet in each stage. `"influence"` (ours): the layers of least influence, adjacent ones as one
            span. `"span"`: one span.
        num_layers_to_replace: How many layers `"block_influence"`, `"influence"` and `"span"` pick.
        span_criterion: How `"span"` chooses. `"error"` (ours): by the error of the last hidden states on held-out
            calibration data, each span with a fitted surrogate (for `"refit"` that of `"down_proj"`, since one of its
            own for each span would take too much memory). `"influence"`: by the sum of its layers' block influence.
            `"angle"`: by the angle between the hidden states before and behind it (arXiv 2403.17887).
        every: K of `"every"`. Paper: 4.
        layers_to_replace: Layers, counted from 0, instead of a placement; no two of them adjacent.
        spans: Spans as `[first, end]`, counted from 0, without the end, instead of a placement: `[[14, 18]]` is layers
            14 to 17.
        init: `"calibrate"` (ours): the coefficients that imitate the removed layers best on the calibration data.
            `"paper"`: 0.5 for both neighbours. `"skip"`: 0, which is plain removal.
        coefficients: Of `"branches"`: one for each `"channel"`, attention `"head"` (value paths only) or a `"scalar"`.
        branches: Of `"branches"`: any of `identity`, `value` (both neighbours' value projection, then output
            projection), `output` (both neighbours' output projection alone, where it is square) and `mlp` (the mean of
            the neighbours' MLPs, which alone costs more than the rest).
        detach_sources: Read the neighbours' weights as constants (paper, Eq 30); `False` lets gradients reach them,
            which `LoPTTrainer` does not allow where a block starts with a surrogate. Of no use to `"linear"` and to
            the four maps, which read no neighbour after their start.
        ridge: Weight of the ridge penalty, relative to the mean square of the features. It draws `"down_proj"` and
            `"refit"` to the weights that are there.
        refit_behind: How many layers behind each span get their last MLP projection refitted too (ours), for
            `"down_proj"` and `"refit"`: one after the other, by the regression of `"refit"`, to what these layers put
            out behind the layers that went. Their weights change in place; fewer where the next span begins, or the
            model ends.
        calibration_tokens: Tokens of the calibration data that are used, at most.
        calibration_seed: Draws the sequences from all of the data at random; `None` takes the first ones.
        calibration_seq_length: Tokens of each calibration sequence.
        calibration_batch_size: Calibration sequences for each forward.
        trainable: What trains afterwards: `"all"` (paper), or the surrogates' `"coefficients"` only.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    # ours: lowest perplexity within 0.35 x the removed layer's arithmetic, see experiments/smollm2-135m/repl
    operator: str = option("linear", "What stands in a removed layer's place.", (*OPERATORS, *CONV_OPERATORS))
    # ours: at the same number of layers plain removal hurts less there than every K-th
    placement: str = option("block_influence", "How layers are chosen.", PLACEMENTS)
    num_layers_to_replace: int | None = option(
        None, "How many layers the placements 'block_influence', 'influence' and 'span' pick."
    )
    # ours
    span_criterion: str = option("error", "How placement 'span' chooses its layers.", SPAN_CRITERIA)
    every: int = option(4, "K of placement 'every' (paper: 4).")  # paper, Sec. 4
    layers_to_replace: list[int] | None = option(None, "Layers to replace, counted from 0, instead of a placement.")
    spans: list[list[int]] | str | None = option(
        None, "Runs of adjacent layers, one surrogate each, as JSON: [[14, 18]] is layers 14 to 17."
    )
    # ours: the paper's coefficients destroy a pretrained model
    init: str = option("calibrate", "How the surrogates start.", INITS)
    # ours: scalars hardly help
    coefficients: str = option("channel", "Granularity of the coefficients of 'branches'.", COEFFICIENTS)
    branches: list[str] = option(  # ours: what folds into one d x d map
        ["identity", "value"], f"Branches of operator 'branches': any of {', '.join(BRANCHES)}."
    )
    detach_sources: bool = option(True, "Read the neighbours' weights as constants (paper, Eq 30).")
    ridge: float = option(  # ours: chosen on WikiText-2, see experiments/smollm2-135m/repl
        0.1, "Ridge penalty of the calibration, relative to the mean square of the features."
    )
    refit_behind: int = option(0, "Layers behind each span whose last MLP projection is refitted too.")  # ours
    # ours: under two minutes on two CPU cores for 135M parameters
    calibration_tokens: int = option(8192, "Tokens of the calibration data that are used, at most.")
    calibration_seed: int | None = option(  # ours
        None, "Draws the calibration sequences from all of the data at random; default: the first ones."
    )
    calibration_seq_length: int = option(512, "Tokens of each calibration sequence.")  # ours
    calibration_batch_size: int = option(4, "Calibration sequences per forward.")  # ours
    trainable: str = option("all", "What trains afterwards.", TRAINABLE)  # paper

    def __post_init__(self) -> None:
        check_choices(self)
        check_lowest(self, _SMALLEST)
        if not 0 <= self.ridge < float("inf"):
            raise ValueError(f"ridge={self.ridge} must be a number from 0 on.")
        self._check_branches()
        self._check_layers()
        self._read_spans()
        self._check_placement()
        self._check_operator()

    def _check_operator(self) -> None:
        if self.operator in MAP_OPERATORS and self.init == "paper":
            raise ValueError(
                f"init='paper' is RepL's, which has no operator={self.operator!r}; set init to 'calibrate' or 'skip'."
            )
        if self.refit_behind > 0 and (self.operator not in MLP_OPERATORS or self.init != "calibrate"):
            raise ValueError(
                f"refit_behind={self.refit_behind} goes on from a calibrated operator in an MLP, but operator="
                f"{self.operator!r} with init={self.init!r} is none; set it to 0, or use 'down_proj' or 'refit' with "
                "'calibrate'."
            )
        if not self.detach_sources and self.operator in ("linear", *MAP_OPERATORS):
            raise ValueError(
                f"detach_sources=False lets gradients reach neighbours, which operator={self.operator!r} does not "
                "read in training; leave it out, or use 'branches'."
            )
        if self.operator in CONV_OPERATORS:
            self._check_convolution()
        if self.operator == "mlp" and self.init != "paper":
            raise ValueError(
                f"operator='mlp' has no coefficients (paper, Eq 25-27), so init={self.init!r} has nothing to set; "
                "set init to 'paper'."
            )
        if self.operator == "mlp" and self.trainable == "coefficients":
            raise ValueError(
                "trainable='coefficients' leaves nothing to train, since operator='mlp' has none; set trainable to "
                "'all', or use another operator."
            )

    def _check_convolution(self) -> None:
        if self.init == "calibrate":
            raise ValueError(
                f"init='calibrate' fits hidden states of tokens, and operator={self.operator!r} has none; set init to "
                "'paper' or 'skip'."
            )
        if self.chooses_by_data:
            raise ValueError(
                f"placement={self.placement!r} measures hidden states of tokens, and operator={self.operator!r} has "
                "none; set placement to 'every', or name blocks with layers_to_replace or spans."
            )

    def _check_branches(self) -> None:
        unknown = [branch for branch in self.branches if branch not in BRANCHES]
        if unknown or not self.branches or len(set(self.branches)) < len(self.branches):
            raise ValueError(f"branches={self.branches} must name each of its branches once: {', '.join(BRANCHES)}.")
        if self.operator == "branches" and self.coefficients == "head" and set(self.branches) - {"value", "output"}:
            raise ValueError(
                f"coefficients='head' needs branches that have heads, but branches={self.branches}; "
                "use ['value'], or another granularity."
            )

    def _check_layers(self) -> None:
        layers = self.layers_to_replace
        if layers is not None and not (isinstance(layers, list | tuple) and all(_is_layer(layer) for layer in layers)):
            raise ValueError(f"layers_to_replace={layers!r} must list whole numbers of layers, like [14, 17].")

    def _read_spans(self) -> None:
        if self.spans is None:
            return
        try:
            spans = json.loads(self.spans) if isinstance(self.spans, str) else self.spans
        except json.JSONDecodeError:
            spans = None
        pairs = spans if isinstance(spans, list | tuple) else []
        if not pairs or not all(_is_pair(pair) for pair in pairs):
            raise ValueError(f"spans={self.spans!r} must list pairs [first, end] of layers, like [[14, 18]].")
        self.spans = [list(pair) for pair in pairs]

    def _check_placement(self) -> None:
        named = {name: getattr(self, name) for name in ("num_layers_to_replace", "layers_to_replace", "spans")}
        given = [f"{name}={value}" for name, value in named.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two ways to say which layers; leave one of them out.")
        has_names = self.layers_to_replace is not None or self.spans is not None
        if has_names or self.placement != "span":
            where = "where the layers are named" if has_names else f"with placement={self.placement!r}"
            check_left_out(
                self,
                ["span_criterion"],
                f"has no effect {where}; leave it out, or set placement to 'span' with num_layers_to_replace.",
            )
        if has_names:
            return
        if self.placement != "every":
            check_left_out(
                self,
                ["every"],
                f"has no effect with placement={self.placement!r}; leave it out, or set that to 'every'.",
            )
        if self.placement == "every":
            if self.num_layers_to_replace is not None:
                raise ValueError(
                    f"num_layers_to_replace={self.num_layers_to_replace} has no effect with placement='every', where "
                    f"every={self.every} says how many; leave it out."
                )
        elif self.num_layers_to_replace is None:
            raise ValueError(
                f"num_layers_to_replace is missing; say how many layers placement={self.placement!r} replaces, "
                "or name them with layers_to_replace or spans."
            )

    @property
    def chooses_by_data(self) -> bool:
        """Whether the surrogates' places follow from data."""
        return self.layers_to_replace is None and self.spans is None and self.placement != "every"

    @property
    def needs_calibration_data(self) -> bool:
        """Whether the surrogates or their places follow from data."""
        return self.chooses_by_data or self.init == "calibrate"

    @property
    def idle(self) -> dict[str, str]:
        """The options that are set but have no effect beside the others, each with the reason."""
        reasons: dict[str, str] = {}
        if self.layers_to_replace is not None or self.spans is not None:
            reasons |= dict.fromkeys(CHOOSING, "chooses layers, which are named")
        if self.operator != "branches":
            reasons |= dict.fromkeys(
                ("coefficients", "branches"), f"is of operator 'branches', not of {self.operator!r}"
            )
        tries_fits = self.chooses_by_data and self.placement == "span" and self.span_criterion == "error"
        if self.init != "calibrate" and not tries_fits:
            reasons["ridge"] = f"is of a fit, and with init={self.init!r} nothing is fitted"
        if not self.needs_calibration_data:
            reasons |= dict.fromkeys(CUTTING, f"cuts calibration data, which init={self.init!r} does without")
        default = RepLConfig(num_layers_to_replace=1)
        return {name: why for name, why in reasons.items() if getattr(self, name) != getattr(default, name)}

    def check_idle(self) -> None:
        """Checks that every option that is set has an effect.

        Not done as a config is made: one that is to be compared with others may have options of theirs.

        Raises:
            ValueError: If one has none.
        """
        for name, why in self.idle.items():
            raise ValueError(f"{name}={getattr(self, name)!r} has no effect: it {why}; leave it out.")

    def without_idle(self) -> "RepLConfig":
        """The same without the options that have no effect."""
        default = RepLConfig(num_layers_to_replace=1)
        return replace(self, **{name: getattr(default, name) for name in self.idle})

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain values."""
        return asdict(self)


def init_of(operator: str) -> str:
    """The best start that an operator has: calibrated, but for one without coefficients or of feature maps."""
    return "paper" if operator in ("mlp", *CONV_OPERATORS) else "calibrate"


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(_is_layer(number) for number in value)
        and value[0] < value[1]
    )
