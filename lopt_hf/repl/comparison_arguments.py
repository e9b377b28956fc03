"""What a comparison of RepL is told: its texts, data and models, and the checks of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers.trainer_utils import IntervalStrategy
from trl import ModelConfig

from lopt_hf.common.arithmetic import DTYPE_HELP
from lopt_hf.common.settings import check_distinct, check_folder, check_lowest, option
from lopt_hf.data.mirror import DATA_DIR_HELP
from lopt_hf.repl.config import RepLConfig
from lopt_hf.repl.trainer import HEALING_FOLDER, HealingConfig

__all__ = [
    "ALL",
    "PLAIN_FOLDER",
    "REPORT",
    "ComparisonArguments",
    "ComparisonModelConfig",
    "check_healing",
    "check_no_healing",
    "check_output_dir",
    "check_scratch",
]

REPORT = "report.json"
ALL = "all"  # a value of `compare`
PLAIN_FOLDER = "plain"
_JUDGED = ("judge", "judge.md", "judge.json")  # of `lopt_hf.bench.repl_judge`
_WRITTEN = (REPORT, "report.md", "unfolded", "folded", PLAIN_FOLDER, HEALING_FOLDER, *_JUDGED)  # in `output_dir`
_TEXT_HELP = "a .txt file, or id:configuration:split of the hub, such as Salesforce/wikitext:wikitext-2-raw-v1:test."


@dataclass
class ComparisonArguments:
    """Texts to calibrate on, to heal with and to evaluate on, and what is compared.

    Parameters:
        dataset_name: Healing data: text, or what `lopt-hf sft` takes. Without it there is no healing.
        calibration_text: A `.txt` file, or `id:configuration:split` of the hub, whose place the default takes where no
            hub answers; default: the first half of the prose that every Python carries.
        eval_text: Text to measure perplexity on, likewise; default: the other half.
        data_dir: Folder with copies of the hub's data sets.
        eval_chunks: Number of pieces of it, spread evenly.
        eval_chunk_length: Tokens of each piece.
        compare: Further operators to measure untrained, as `operator`, `operator:init` or
            `operator:init:refit_behind`. `all` adds all of them, but
            for those that do not fit the model or the settings.
        seeds: Seeds of the healing runs.
        scratch: Changes to the model's config. With it nothing is pretrained: for every seed the full model, plain
            removal and RepL are trained from the same random weights (the paper's language experiment).
    """

    dataset_name: str | None = option(None, "Healing data: .txt, .jsonl, hub id.")
    calibration_text: str | None = option(None, f"Text to calibrate on: {_TEXT_HELP}")
    eval_text: str | None = option(None, f"Text to measure perplexity on: {_TEXT_HELP}")
    data_dir: str | None = option(None, DATA_DIR_HELP)
    eval_chunks: int = option(32, "Pieces of the text to measure perplexity on.")
    eval_chunk_length: int = option(256, "Tokens of each piece.")
    compare: list[str] = option([], "Further operators beside it: 'operator[:init[:refit_behind]]'; 'all' of them.")
    seeds: list[int] = option([0], "Seeds of the healing runs.")
    scratch: dict[str, Any] | str | None = option(
        None, "Start from random weights; JSON with changes to the model's config, '{}' for none."
    )

    def __post_init__(self) -> None:
        check_lowest(self, {"eval_chunks": 2, "eval_chunk_length": 2})
        check_distinct("seeds", self.seeds)
        if isinstance(self.scratch, str):
            self.scratch = _json_object("scratch", self.scratch)
        if self.scratch is not None and self.dataset_name is None:
            raise ValueError(
                "scratch without dataset_name leaves nothing to train on; give a .txt file or a data set."
            )
        if self.scratch is not None and self.compare:
            raise ValueError(f"compare={self.compare} measures untrained models; leave it out where scratch is set.")


@dataclass
class ComparisonModelConfig(ModelConfig):
    """`ModelConfig` whose `dtype` also decides on the arithmetic of training, of a model that is not quantised.

    Parameters:
        dtype: Of the weights, which are in float32 with `"auto"`. In training `"float32"` switches `bf16` off, unless
            that is given; with `"auto"` the faster arithmetic is chosen.

    Raises:
        ValueError: If the model is to be quantised.
    """

    idle_options: ClassVar[tuple[str, ...]] = ("load_in_4bit", "load_in_8bit")  # which `--help` leaves out

    dtype: str | None = option(
        "auto",
        f"{DTYPE_HELP} Weights are in this type; with auto in float32, and only the arithmetic of training is chosen.",
        ("auto", "float32", "bfloat16", "float16"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.idle_options:
            if getattr(self, name):
                raise ValueError(f"{name}=True: layers of a quantised model cannot be replaced; leave it out.")


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{option}={text!r} is no JSON object; write it like '{{\"num_hidden_layers\": 12}}'.")
    return value


def check_scratch(config: RepLConfig) -> None:
    """Checks that nothing is to be fitted to random weights.

    Raises:
        ValueError: If the initialisation or the placement of surrogates would be.
    """
    if config.init == "calibrate":
        raise ValueError("init='calibrate' has nothing to imitate in random weights; use 'paper' or 'skip'.")
    if config.chooses_by_data:
        raise ValueError(
            f"placement={config.placement!r} says nothing of random weights; use 'every' or name the layers."
        )


def check_no_healing(script_args: ComparisonArguments, model_args: ModelConfig) -> None:
    """Checks that nothing is asked of healing where there is none.

    Raises:
        ValueError: If something is.
    """
    for name, value, default in (("seeds", script_args.seeds, [0]), ("use_peft", model_args.use_peft, False)):
        if value != default:
            raise ValueError(f"{name}={value} has no effect without healing; give dataset_name, or leave it out.")


def check_healing(args: HealingConfig) -> None:
    """Checks that nothing is asked of training that healing does not do.

    Raises:
        ValueError: If something is.
    """
    if str(args.resume_from_checkpoint or "false").lower() != "false":
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint} has no effect: a run heals several models, each "
            "from its start; leave it out, and begin anew in another output_dir."
        )
    if args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={IntervalStrategy(args.eval_strategy).value} has no data to evaluate on while a model "
            "heals; leave it out. Perplexity on eval_text is measured before and after."
        )
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub=True would upload none of the models that are compared; leave it out, and push what "
            "output_dir holds at the end."
        )
    if args.seed != HealingConfig.__dataclass_fields__["seed"].default:
        raise ValueError(f"seed={args.seed} has no effect: the healing runs take theirs from seeds; set seeds.")


def check_output_dir(output_dir: str) -> None:
    """Checks that a run overwrites nothing.

    Raises:
        ValueError: If the folder holds a file or a folder of another run, though it was stopped.
    """
    check_folder("output_dir", output_dir)
    for name in _WRITTEN:
        if (Path(output_dir) / name).exists():
            raise ValueError(f"output_dir={output_dir!r} holds another run's {name}; choose another output_dir.")
