"""The settings of `lopt-hf compare`: a grid of methods, learning rates and seeds over one task, read from a YAML."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from lopt_hf.common.arithmetic import DTYPE_HELP, read_dtype
from lopt_hf.common.compared_methods import PEERS
from lopt_hf.common.settings import check_distinct, check_lowest, option, suggest
from lopt_hf.common.typed import check_types, check_value
from lopt_hf.common.yaml_files import load_settings
from lopt_hf.compare.runs import (
    EARLY_RATE_RATIO,
    OPTION_TYPES,
    GridRun,
    check_methods,
    check_option_types,
    check_pipelines,
    check_replay,
    check_reserved,
    make_run,
    rates_of,
)
from lopt_hf.data.mirror import given_data_dir
from lopt_hf.retention.clusters import AUTO, CLUSTER_HELP
from lopt_hf.retention.deltas import MARGIN, MARGIN_HELP, check_change

__all__ = ["Grid", "GridRun", "load_grid"]


@dataclass(frozen=True)
class Grid:
    """The settings of `lopt-hf compare`.

    Raises:
        ValueError: If a value is missing or out of range; the message names field, value and fix.
    """

    model: str = field(metadata={"help": "Hub id or local folder of the base."})
    train_dataset: str = field(
        metadata={"help": "Data to train on: hub id or local file, in any layout of lopt-hf sft."}
    )
    heldout_dataset: str = field(metadata={"help": "Data whose answers' loss is the gain, in the same layouts."})
    methods: Mapping[str, Mapping[str, Any]] = field(
        metadata={
            "help": "Label -> arguments of lopt-hf sft, with method: mlaan of lopt-hf mlaan, with "
            f"{', '.join((*PEERS, 'osf'))} of lopt-hf peers, with num_stages of lopt-hf pipeline. "
            "Also learning_rates and num_train, in place of the grid's; "
            f"{EARLY_RATE_RATIO}: the early blocks' rate as a share of the run's; "
            "replay_share: the share of the training rows that are of replay_dataset, added to num_train. "
            "Or average_of and alpha in place of all these: (1 - alpha) x the base's weights + alpha x those of the "
            "method named, without training (WiSE-FT)."
        }
    )
    learning_rates: Sequence[float] = field(metadata={"help": "Peak rates; each method runs with each."})
    training: Mapping[str, Any] = field(metadata={"help": "Arguments of lopt-hf sft that all runs share."})
    tasks: Sequence[str] = field(metadata={"help": "lm-eval tasks or groups that measure retention."})
    output_dir: str = field(metadata={"help": "Folder of runs, results and report; reused to go on."})
    include_path: str | None = option(None, "Folder with further lm-eval tasks.")
    mirror: Mapping[str, Any] | None = option(
        None, "Settings that --data-dir puts in the place of the file's; the paths among them are in that folder."
    )
    dataset_config: str | None = option(None, "Configuration of both data sets, for hub ids that have several.")
    train_split: str = option("train", "Split of train_dataset. A file has train only.")
    heldout_split: str = option("train", "Split of heldout_dataset; test of most hub ids.")
    replay_dataset: str | None = option(
        None,
        "General text of the methods with a replay_share: data in any layout of lopt-hf sft, a .txt file, or "
        "id:configuration:split of a hub's text, whose passages are to be continued. Default: prose that every Python "
        "carries.",
    )
    replay_split: str = option("train", "Split of replay_dataset.")
    samples: Mapping[str, int | Sequence[int]] = option(
        {}, "Task -> how many of its first samples, or which. Default: all."
    )
    contrasts: Sequence[Sequence[str]] = option(
        (),
        "Pairs of methods to subtract, the second from the first: at each learning rate that both have, "
        "and at the gain of the first's points on the second's line.",
    )
    seeds: Sequence[int] = option((0, 1, 2), "Each run is repeated with each seed.")
    num_train: int = option(128, "Rows to train on, drawn with the run's seed.")
    num_heldout: int = option(64, "First rows of the held-out data.")
    margin: float = option(MARGIN, MARGIN_HELP)
    cluster_by: str = option(AUTO, CLUSTER_HELP)
    workers: int = option(1, "Runs at a time; on a CPU each takes its share of the cores, and so does each stage.")
    eval_batch_size: int = option(16, "Requests per forward when measuring.")
    dtype: str = option(
        "auto",
        f"{DTYPE_HELP} Of training where neither bf16 nor fp16 is set for it, and of measuring where "
        "eval_dtype is auto and this is not.",
    )
    eval_dtype: str = option(
        "auto",
        "All models' weights when measuring; auto: dtype, or where that is auto too as the base was "
        "saved, but float32 where this machine is slower in bfloat16.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", read_dtype(self.dtype))
        self._check_dtype()
        for name in ("methods", "learning_rates", "tasks", "seeds"):
            value = getattr(self, name)
            if not value:
                raise ValueError(f"{name}={value!r} is empty; name at least one.")
        self._check_rates()
        check_methods(self.methods, self.learning_rates)
        check_distinct("seeds", self.seeds)
        check_change("margin", self.margin)
        check_lowest(self, dict.fromkeys(("num_train", "num_heldout", "workers", "eval_batch_size"), 1))
        if "max_length" not in self.training:
            raise ValueError("training.max_length is missing; set it: longer rows are left out of every run's data.")
        check_reserved(self.training, self.methods)
        for setting in OPTION_TYPES.keys() & self.training.keys():
            raise ValueError(f"training.{setting} is an option of a method; set methods.<label>.{setting} instead.")
        if any("model_revision" in arguments for arguments in (self.training, *self.methods.values())):
            raise ValueError(
                "model_revision would train from one revision and measure another as the base; download the one that "
                "is meant and name its folder as `model`."
            )
        check_replay(self.runs(), self.replay_dataset)
        for pair in self.contrasts:
            if len(pair) != 2 or any(method not in self.methods for method in pair):
                raise ValueError(f"contrasts: {list(pair)} must be two of the methods {', '.join(self.methods)}.")
        check_pipelines(self.runs())
        names = [run.name for run in self.runs()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"methods: two labels make the same folder name {name!r}; change one of them.")

    def _check_rates(self) -> None:
        of_methods = {
            f"methods.{method}.learning_rates": options["learning_rates"]
            for method, options in self.methods.items()
            if "learning_rates" in options
        }
        for name, rates in {"learning_rates": self.learning_rates, **of_methods}.items():
            check_distinct(name, rates)
            for rate in rates:
                if not 0 < rate < math.inf:
                    raise ValueError(f"{name}: {rate} is no learning rate; set it above 0.")

    def _check_dtype(self) -> None:
        for arguments in (self.training, *self.methods.values()):
            for name in ("bf16", "fp16"):
                if self.dtype != "auto" and arguments.get(name) is not None:
                    raise ValueError(
                        f"dtype={self.dtype!r} and {name}={arguments[name]!r} both say in which type to train; leave "
                        "one of them out."
                    )

    @property
    def output_path(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    def runs(self) -> list[GridRun]:
        """All runs, one whole pass over methods and rates for each seed."""
        return [
            make_run(method, options, self.training, learning_rate, seed, self.num_train)
            for seed in self.seeds
            for method, options in self.methods.items()
            for learning_rate in rates_of(method, self.methods, self.learning_rates)
        ]


def load_grid(path: Path, data_dir: Path | None = None, **overrides: Any) -> Grid:
    """Reads a grid from a YAML file.

    Args:
        path: The file; relative paths in it are relative to the working folder, as in recipes.
        data_dir: Folder of local data; the file's `mirror` has the settings that are in force with it. Default: the
            folder that `LOPT_HF_DATA_DIR` names, if the file has a `mirror`.
        overrides: Settings that replace those of the file; `None` leaves the file's.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML mapping, or names an unknown setting or a bad value; or if there is no such
            `data_dir`, or the file has no `mirror` for it.
    """
    if not path.exists():
        raise FileNotFoundError(f"config={path}: there is no such file.")
    settings = load_settings(path, "see `lopt-hf recipes smollm2-135m/retention/gsm8k`")
    settings.update(_mirrored(path, settings.get("mirror"), data_dir))
    settings.update({name: value for name, value in overrides.items() if value is not None})
    known = {setting.name: setting for setting in fields(Grid)}
    for name in settings.keys() - known.keys():
        raise ValueError(f"config={path}: unknown setting {name!r} ({suggest(name, known)}).")
    required = [each.name for each in known.values() if each.default is MISSING and each.default_factory is MISSING]
    missing = [name for name in required if name not in settings]
    if missing:
        raise ValueError(f"config={path}: {', '.join(missing)} missing; {known[missing[0]].metadata['help']}")
    try:
        check_types(settings, Grid)
        if "max_length" in settings["training"]:
            check_value("training.max_length", settings["training"]["max_length"], int)
        check_option_types(settings["methods"])
        return Grid(**settings)
    except ValueError as error:
        raise ValueError(f"config={path}: {error}") from error


def _mirrored(path: Path, mirror: Any, data_dir: Path | None) -> dict[str, Any]:
    """The settings of a grid's `mirror`, with their paths in the folder of the data; none without such a folder."""
    if mirror is None:
        if data_dir is not None:
            raise ValueError(f"data_dir={str(data_dir)!r}: config={path} has no mirror, so leave it out, or add one.")
        return {}
    check_value("mirror", mirror, Mapping[str, Any])
    folder = given_data_dir(data_dir)
    if folder is None:
        return {}
    paths = ("train_dataset", "heldout_dataset", "replay_dataset", "include_path")
    is_path = {name: name in paths and value is not None for name, value in mirror.items()}
    return {name: str(folder / value) if is_path[name] else value for name, value in mirror.items()}
