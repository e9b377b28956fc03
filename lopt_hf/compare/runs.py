"""The runs of a grid: what is trained, and what is made of trained models without training."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lopt_hf.common.compared_methods import PEERS
from lopt_hf.common.settings import check_at_least, check_choice
from lopt_hf.common.typed import check_value
from lopt_hf.pipeline.gradient import default_gradient

__all__ = [
    "EARLY_RATE_RATIO",
    "FAMILIES",
    "OPTION_TYPES",
    "GridRun",
    "check_methods",
    "check_option_types",
    "check_pipelines",
    "check_replay",
    "check_reserved",
    "make_run",
    "rates_of",
]

# An option of a method that stands for another one: the early blocks' rate, as a share of the run's learning rate
EARLY_RATE_RATIO = "early_learning_rate_ratio"

METHODS = ("lopt", "reach", "freeze", "mlaan", "e2e", *PEERS, "osf")
PIPELINE_METHODS = ("lopt", "mlaan")
# The options of a method that the grid reads itself; all others are the command's
OPTION_TYPES: dict[str, Any] = {
    "learning_rates": Sequence[float],
    "num_train": int,
    EARLY_RATE_RATIO: float,
    "average_of": str,
    "alpha": float,
    "replay_share": float,
}
# Arguments of the commands that the grid sets, and what says their values
OF_GRID = {
    "model_name_or_path": "model of the grid",
    "dataset_name": "train_dataset of the grid",
    "dataset_max_samples": "num_train of the method or of the grid",
    "learning_rate": "learning_rates of the method or of the grid",
    "seed": "seeds of the grid",
    "output_dir": "output_dir of the grid",
}
OF_AVERAGES = ("average_of", "alpha", "learning_rates")
# What a report draws alike: by colour and shape
FAMILIES = (
    "end-to-end",
    "weight averaging",
    "replay",
    "adapters",
    "freezing",
    "one part at a time",
    "reach",
    "local losses",
)


@dataclass(frozen=True)
class GridRun:
    """One fine-tuned model of the grid.

    Parameters:
        method: Label of the method.
        learning_rate: Peak learning rate.
        seed: Seed of the drawn training rows, of their order and of new weights.
        num_train: How many rows of the task are drawn.
        arguments: Arguments of `lopt-hf sft`, without data and output folder; `method: mlaan` is `lopt-hf mlaan`,
            `osf` and a method of `PEERS` are of `lopt-hf peers`, and what has `num_stages` is of `lopt-hf pipeline`.
        source: Label of the method whose model is averaged with the base in place of training.
        alpha: Weight of that model in the average; the rest is the base's.
        replay_share: Share of the rows that are general text.
    """

    method: str
    learning_rate: float
    seed: int
    num_train: int
    arguments: Mapping[str, Any]
    source: str | None = None
    alpha: float = 1.0
    replay_share: float = 0.0

    @property
    def command(self) -> str:
        """The command that trains it: `sft`, `pipeline`, `peers`, or `mlaan`, which has no argument `method`."""
        method = self.arguments.get("method")
        if "num_stages" in self.arguments:
            return "pipeline"
        return "mlaan" if method == "mlaan" else "peers" if method in (*PEERS, "osf") else "sft"

    @property
    def num_processes(self) -> int:
        """Processes of this machine that train it."""
        if self.command != "pipeline":
            return 1
        return int(self.arguments["num_stages"]) * int(self.arguments.get("data_parallel", 1))

    @property
    def command_arguments(self) -> dict[str, Any]:
        """The arguments of that command."""
        return {name: value for name, value in self.arguments.items() if (self.command, name) != ("mlaan", "method")}

    @property
    def command_line(self) -> str:
        """That command as one would type it, without data and folders; of an average what it is of."""
        if self.source is not None:
            return (
                f"(1 - {self.alpha:g}) x base + {self.alpha:g} x {self.source}, learning rate {self.learning_rate:g}"
            )
        words = ["lopt-hf", self.command]
        for name, value in self.command_arguments.items():
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *map(str, values)]
        return shlex.join(words)

    @property
    def num_replayed(self) -> int:
        """How many rows of general text are added: as near to their share of all rows as whole rows come."""
        return round(self.num_train * self.replay_share / (1 - self.replay_share))

    @property
    def family(self) -> str:
        """Which of `FAMILIES` the method is of."""
        arguments = self.arguments
        method = arguments.get("method", "lopt")
        if self.source is not None:
            return "weight averaging"
        if self.replay_share:
            return "replay"
        if arguments.get("use_peft") or method == "osf":
            return "adapters" if method in ("e2e", "osf") else "local losses"
        if method in ("lisa", "badam"):
            return "one part at a time"
        if method in ("freeze", "freeze_last") or arguments.get("train_early_blocks") is False:
            return "freezing"
        if method == "reach" or (method == "lopt" and (arguments.get("task_reach") or self._has_late_gradients)):
            return "reach"
        if method == "lopt" and arguments.get("local_objective") == "none":
            return "freezing"
        return "end-to-end" if method.startswith("e2e") else "local losses"

    @property
    def _has_late_gradients(self) -> bool:
        given = self.arguments
        if self.command != "pipeline" or "gradient" in given:
            return given.get("gradient", "local") != "local"
        stages = given["num_stages"]
        return default_gradient(given.get("local_objective"), given.get("num_blocks", stages), stages) == "delayed"

    @property
    def name(self) -> str:
        """Unique name, good for a folder."""
        label = re.sub(r"[^a-z0-9]+", "-", self.method.lower()).strip("-")
        return f"{label}_lr{self.learning_rate:g}_seed{self.seed}"


def rates_of(method: str, methods: Mapping[str, Mapping[str, Any]], of_grid: Sequence[float]) -> Sequence[float]:
    """Returns the learning rates of a method: its own, or those of the method that it averages, or the grid's."""
    options = methods[method]
    if "learning_rates" in options:
        return options["learning_rates"]
    source = options.get("average_of")
    return of_grid if source is None else rates_of(source, methods, of_grid)


def make_run(
    method: str, options: Mapping[str, Any], training: Mapping[str, Any], rate: float, seed: int, num_train: int
) -> GridRun:
    """Makes one run.

    Args:
        method: Label of the method.
        options: Its options.
        training: Arguments that all runs share.
        rate: Peak learning rate.
        seed: As in `GridRun`.
        num_train: Rows of the task where the options do not say.
    """
    if "average_of" in options:
        alpha = float(options["alpha"])
        return GridRun(method, rate, seed, num_train, {}, source=options["average_of"], alpha=alpha)
    arguments = {**training, **options, "learning_rate": rate, "seed": seed}
    arguments.pop("learning_rates", None)
    num_train = arguments.pop("num_train", num_train)
    share = arguments.pop("replay_share", 0.0)
    ratio = arguments.pop(EARLY_RATE_RATIO, None)
    if ratio is not None:
        arguments["early_learning_rate"] = float(f"{ratio * rate:.6g}")
    return GridRun(method, rate, seed, num_train, arguments, replay_share=share)


def check_methods(methods: Mapping[str, Mapping[str, Any]], of_grid: Sequence[float]) -> None:
    """Checks the methods of a grid.

    Raises:
        ValueError: If one is unknown, or averages or replays what there is not; names field, value and fix.
    """
    for label, options in methods.items():
        check_choice(f"methods.{label}.method", options.get("method", "lopt"), METHODS)
        share = options.get("replay_share")
        if share is not None and not 0 < share < 1:
            raise ValueError(f"methods.{label}.replay_share={share} is no share; give one between 0 and 1, as 0.05.")
        if EARLY_RATE_RATIO in options and "early_learning_rate" in options:
            raise ValueError(
                f"methods.{label}.early_learning_rate={options['early_learning_rate']!r} is replaced by "
                f"{EARLY_RATE_RATIO}={options[EARLY_RATE_RATIO]!r}; leave one of them out."
            )
        if "average_of" in options:
            _check_average(label, methods, of_grid)
        elif "alpha" in options:
            raise ValueError(f"methods.{label}.alpha is a weight of an average; name the method in average_of.")


def check_reserved(training: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that no argument is given that the grid would replace.

    Raises:
        ValueError: If one is; names field, value and fix.
    """
    for place, arguments in {"training": training, **{f"methods.{name}": methods[name] for name in methods}}.items():
        for name, instead in OF_GRID.items():
            if name in arguments:
                raise ValueError(
                    f"{place}.{name}={arguments[name]!r} is set by the grid itself; set {instead} instead."
                )


def check_replay(runs: Sequence[GridRun], replay_dataset: str | None) -> None:
    """Checks that general text that is asked for is trained on.

    Raises:
        ValueError: If a share is less than one row, or no method has a share of the text; names field, value and fix.
    """
    for run in runs:
        if run.replay_share and not run.num_replayed:
            raise ValueError(
                f"methods.{run.method}.replay_share={run.replay_share:g} of {run.num_train} rows is less than one row "
                "of general text; raise it, or num_train."
            )
    if replay_dataset is not None and not any(run.replay_share for run in runs):
        raise ValueError(
            f"replay_dataset={replay_dataset!r}, but no method has a replay_share; give one, or leave it out."
        )


def _check_average(label: str, methods: Mapping[str, Mapping[str, Any]], of_grid: Sequence[float]) -> None:
    options = methods[label]
    trained = [name for name, other in methods.items() if "average_of" not in other]
    if not trained:
        raise ValueError(f"methods.{label}.average_of: no method of the grid is trained; add one to average.")
    check_choice(f"methods.{label}.average_of", options["average_of"], trained)
    others = sorted(options.keys() - set(OF_AVERAGES))
    if others:
        raise ValueError(
            f"methods.{label}.{others[0]}: an average of {options['average_of']} and the base trains nothing; leave "
            f"it out, or set it there."
        )
    alpha = options.get("alpha")
    if alpha is None or not 0 <= alpha <= 1:
        raise ValueError(f"methods.{label}.alpha={alpha} is no weight; give one from 0, the base, to 1, the model.")
    known = rates_of(options["average_of"], methods, of_grid)
    for rate in options.get("learning_rates", ()):
        if rate not in known:
            raise ValueError(
                f"methods.{label}.learning_rates: {options['average_of']} has no run at {rate:g}; choose from "
                f"{', '.join(f'{each:g}' for each in known)}."
            )


def check_pipelines(runs: Sequence[GridRun]) -> None:
    """Checks that what is trained in a pipeline can be, and that what is of a pipeline is trained in one.

    Raises:
        ValueError: If not; names method, argument and fix.
    """
    for run in runs:
        method = run.arguments.get("method", "lopt")
        if run.command == "pipeline":
            check_value(f"methods.{run.method}.num_stages", run.arguments["num_stages"], int)
            check_value(f"methods.{run.method}.data_parallel", run.arguments.get("data_parallel", 1), int)
            if method not in PIPELINE_METHODS:
                raise ValueError(
                    f"methods.{run.method}: method={method!r} with num_stages={run.arguments['num_stages']}, but a "
                    f"pipeline trains by {' or '.join(PIPELINE_METHODS)}; leave num_stages out, of `training` too."
                )
        elif "gradient" in run.arguments:
            raise ValueError(
                f"methods.{run.method}: gradient={run.arguments['gradient']!r} is an argument of lopt-hf pipeline; "
                "give num_stages too, or leave it out."
            )


def check_option_types(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks the types of the options that the grid itself reads; all others are the commands'.

    Raises:
        ValueError: If one has another; names field, value and fix.
    """
    for method, options in methods.items():
        for name in OPTION_TYPES.keys() & options.keys():
            check_value(f"methods.{method}.{name}", options[name], OPTION_TYPES[name])
        check_at_least(f"methods.{method}.num_train", options.get("num_train", 1), 1)
