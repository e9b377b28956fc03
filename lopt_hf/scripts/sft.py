"""Supervised fine-tuning with local learning.

```bash
lopt-hf sft --method reach --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/Capybara \\
    --output_dir out
lopt-hf sft --config smollm2-135m/sft/reach_k2
lopt-hf sft --method mlaan --config smollm2-135m/mlaan/k4
lopt-hf sft --method mlaan --help                                              # the options of that method
lopt-hf sft --accelerate_config ddp_2 --config ...
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

from lopt_hf.common.settings import option
from lopt_hf.data.formats import to_trl_format
from lopt_hf.data.prepared import say_what_was_cut
from lopt_hf.data.rows import EmptyRowError
from lopt_hf.data.word_problems import make_word_problems
from lopt_hf.scripts.parsing import chosen_method, make_trl_parser
from lopt_hf.scripts.presets import preset_of
from lopt_hf.scripts.training import (
    METHOD_HELP,
    METHODS,
    DataArguments,
    MethodArguments,
    load_rows,
    prepare,
    run_training,
)
from lopt_hf.trainers.configs import LoPTConfig, MLAANConfig, convert_config
from lopt_hf.trainers.sft import LoPTTrainer, MLAANTrainer

__all__ = ["WORD_PROBLEMS", "SFTDataArguments", "SFTScriptArguments", "load_split", "main", "make_parser"]

WORD_PROBLEMS = "word-problems"
GENERATED = {WORD_PROBLEMS: make_word_problems}


@dataclass
class SFTDataArguments(DataArguments):
    """Which data to train on.

    Parameters:
        dataset_name: Hub id, local `.json`, `.jsonl` or `.parquet` file, or `word-problems` for the generated
            arithmetic that the package carries.
        dataset_max_samples: Train on this many rows, drawn with the run's seed.
        skip_empty_rows: Leave out rows without text or answer; a line says how many, but of a stream.
    """

    dataset_name: str | None = option(
        None,
        "Hub id, local .json, .jsonl or .parquet file, or 'word-problems' (generated, offline). "
        "Columns: any layout of SFTTrainer, Alpaca, MetaMath, query/response.",
    )
    skip_empty_rows: bool = option(
        False, "Leave out rows without text or answer, and say how many, but of a stream. Otherwise they are errors."
    )


@dataclass
class SFTScriptArguments(MethodArguments, SFTDataArguments):
    """Which data to train on, and by which method.

    Parameters:
        method: One of `MethodArguments`, or `"mlaan"`, which has options of its own.
    """

    method: str = option(
        "lopt",
        f"{METHOD_HELP}, or 'mlaan' (early blocks learn the task through auxiliaries; `--method mlaan --help` shows "
        "its options).",
        [*METHODS, "mlaan"],
    )


def make_parser(method: str = "lopt", argv: Sequence[str] | None = ()) -> TrlParser:
    """Makes the parser of this command: script, training and model arguments, and `--config file.yaml`.

    Args:
        method: The method whose training arguments and defaults it has.
        argv: What it is to parse; default: nothing.
    """
    config_class = MLAANConfig if method == "mlaan" else LoPTConfig
    parser = make_trl_parser("sft", __doc__, SFTScriptArguments, config_class, ModelConfig)
    parser.set_defaults(**preset_of(method, argv))
    return parser


def load_split(script_args: SFTDataArguments, split: str, seed: int, text_field: str = "text") -> Any:
    """Loads one split of the data in a layout that `SFTTrainer` takes."""
    rows = load_rows(script_args, split, seed, GENERATED)
    try:
        return to_trl_format(rows, text_field, script_args.skip_empty_rows)
    except EmptyRowError as error:
        raise EmptyRowError(f"{error} Or set skip_empty_rows to leave out all such rows.") from error


def make_trainer(
    script_args: SFTScriptArguments, args: LoPTConfig | MLAANConfig, model_args: ModelConfig
) -> SFTTrainer:
    """Builds the trainer of `method` from parsed arguments."""
    model, given = prepare(script_args, args, model_args, partial(load_split, text_field=args.dataset_text_field))
    if script_args.method == "e2e":
        trainer = SFTTrainer(model, convert_config(args, SFTConfig), **given)
    else:
        trainer_class = MLAANTrainer if script_args.method == "mlaan" else LoPTTrainer
        trainer = trainer_class(model, args, **given)
    if not args.packing:
        say_what_was_cut(given["train_dataset"], trainer.train_dataset, args.max_length)
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and, if asked to, pushes a model."""
    run_training(make_parser(chosen_method(argv), argv), argv, make_trainer)


if __name__ == "__main__":
    main()
