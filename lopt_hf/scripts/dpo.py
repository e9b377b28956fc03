"""Direct preference optimisation with LoPT.

```bash
lopt-hf dpo --config smollm2-135m/dpo/reach_k2
lopt-hf dpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized \\
    --output_dir out
lopt-hf dpo --accelerate_config ddp_2 --config ...
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser

from lopt_hf.common.settings import option
from lopt_hf.data.arithmetic import make_arithmetic_pairs
from lopt_hf.data.preferences import to_preferences
from lopt_hf.data.prepared import say_what_was_cut
from lopt_hf.local.run_facts import NEXT_TOKEN_MISFITS
from lopt_hf.scripts.parsing import chosen_method, make_trl_parser, refuse_method
from lopt_hf.scripts.presets import preset_of
from lopt_hf.scripts.training import DataArguments, MethodArguments, load_rows, prepare, run_training
from lopt_hf.trainers.checks import check_dataset
from lopt_hf.trainers.configs import LoPTDPOConfig, convert_config
from lopt_hf.trainers.dpo import LAYOUTS, LoPTDPOTrainer

__all__ = ["DPOScriptArguments", "main", "make_parser"]

GENERATED = {"arithmetic": make_arithmetic_pairs}


@dataclass
class DPOScriptArguments(MethodArguments, DataArguments):
    """Which pairs to train on, and by which method.

    Parameters:
        dataset_name: Hub id, local `.json`, `.jsonl` or `.parquet` file, or `arithmetic` for the generated pairs of
            right and wrong worked answers that the package carries.
    """

    dataset_name: str | None = option(
        None,
        "Hub id, local .json, .jsonl or .parquet file with the columns chosen, rejected and, unless these "
        "begin with it, prompt or question (system, history); or 'arithmetic' (generated, offline).",
    )


def make_parser(method: str = "lopt", argv: Sequence[str] | None = ()) -> TrlParser:
    """Makes the parser of this command: script, training and model arguments, and `--config file.yaml`.

    Args:
        method: The method whose defaults it has.
        argv: What it is to parse; default: nothing.
    """
    parser = make_trl_parser("dpo", __doc__, DPOScriptArguments, LoPTDPOConfig, ModelConfig)
    parser.set_defaults(**preset_of(method, argv))
    return parser


def load_split(script_args: DataArguments, split: str, seed: int) -> Any:
    """Loads one split of the data in a layout that `DPOTrainer` takes."""
    return to_preferences(load_rows(script_args, split, seed, GENERATED))


def make_trainer(script_args: DPOScriptArguments, args: LoPTDPOConfig, model_args: ModelConfig) -> DPOTrainer:
    """Builds the trainer of `method` from parsed arguments."""
    model, given = prepare(script_args, args, model_args, load_split)
    if script_args.method == "e2e":
        check_dataset(given["train_dataset"], LAYOUTS)
        trainer = DPOTrainer(model, args=convert_config(args, DPOConfig), **given)
    else:
        trainer = LoPTDPOTrainer(model, args=args, **given)
    say_what_was_cut(given["train_dataset"], trainer.train_dataset, args.max_length)
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and, if asked to, pushes a model."""
    refuse_method("dpo", argv, {"mlaan": f"{NEXT_TOKEN_MISFITS['DPO']}; use 'lopt' or 'e2e'"})
    run_training(make_parser(chosen_method(argv), argv), argv, make_trainer)


if __name__ == "__main__":
    main()
