"""Supervised fine-tuning with LoPT.

```bash
lopt-hf sft --config recipes/smollm2-135m/sft/lopt_k2.yaml
lopt-hf sft --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name tatsu-lab/alpaca --output_dir out
accelerate launch --config_file recipes/accelerate_configs/ddp_2.yaml -m lopt_hf.scripts.sft --config ...
```
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from lopt_hf.data.formats import load_sft_dataset, to_trl_format
from lopt_hf.data.word_problems import make_word_problems
from lopt_hf.pretrained import resolve_model
from lopt_hf.scripts.parsing import parse_or_exit
from lopt_hf.trainers.checks import check_output_dir
from lopt_hf.trainers.lopt_config import LocalLearningArguments, LoPTConfig
from lopt_hf.trainers.lopt_trainer import LoPTTrainer

__all__ = [
    "SFTDataArguments",
    "SFTScriptArguments",
    "main",
    "make_parser",
    "resumed_checkpoint",
    "train_and_save",
    "trainer_inputs",
]

WORD_PROBLEMS = "word-problems"
WORD_PROBLEM_SIZES = {"num_train": 512, "num_heldout": 64}


@dataclass
class SFTDataArguments(ScriptArguments):
    """Which data to train on.

    Parameters:
        dataset_name: Hub id, local `.json`, `.jsonl` or `.parquet` file, or `word-problems` for the generated
            arithmetic that the package carries.
        dataset_max_samples: Train on this many rows, drawn with the run's seed.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local .json, .jsonl or .parquet file, or 'word-problems' (generated, offline). "
            "Columns: any layout of SFTTrainer, Alpaca, MetaMath, query/response."
        },
    )
    dataset_max_samples: int | None = field(
        default=None, metadata={"help": "Train on this many rows, drawn with the run's seed. Default: all."}
    )


@dataclass
class SFTScriptArguments(SFTDataArguments):
    """Which data to train on, and by which method.

    Parameters:
        method: `"lopt"`, or `"e2e"` for `SFTTrainer` itself with the same arguments.
    """

    method: str = field(
        default="lopt",
        metadata={"help": "'lopt', or 'e2e' for plain end-to-end SFTTrainer.", "choices": ["lopt", "e2e"]},
    )


def make_parser() -> TrlParser:
    """The parser of this command: script, training and model arguments, and `--config file.yaml`."""
    dataclass_types: Any = (SFTScriptArguments, LoPTConfig, ModelConfig)
    return TrlParser(dataclass_types, prog="lopt-hf sft", description=__doc__)


def load_split(script_args: SFTDataArguments, split: str, seed: int) -> Any:
    """Loads one split of the data in a layout that `SFTTrainer` takes."""
    if script_args.dataset_name is None:
        raise ValueError("dataset_name is missing; give a hub id, a local .json, .jsonl or .parquet file.")
    if script_args.dataset_name == WORD_PROBLEMS:
        problems = make_word_problems(**WORD_PROBLEM_SIZES, seed=seed)
        if split not in problems:
            raise ValueError(f"dataset split {split!r} is unknown; {WORD_PROBLEMS} has {', '.join(problems)}.")
        return problems[split].select_columns(["prompt", "completion"])
    dataset = load_sft_dataset(
        script_args.dataset_name, script_args.dataset_config, split, script_args.dataset_streaming
    )
    return to_trl_format(dataset)


def draw(dataset: Dataset | IterableDataset, max_samples: int | None, seed: int) -> Dataset | IterableDataset:
    """Keeps `max_samples` rows of a shuffled data set.

    Raises:
        ValueError: If `max_samples` is not positive.
    """
    if max_samples is None:
        return dataset
    if max_samples < 1:
        raise ValueError(f"dataset_max_samples={max_samples} leaves nothing to train on; give at least 1.")
    return dataset.shuffle(seed=seed).take(max_samples)


def end_to_end_args(args: LoPTConfig) -> SFTConfig:
    """The same training arguments for `SFTTrainer`: without those of local learning."""
    local = {f.name for f in fields(LocalLearningArguments)}
    return SFTConfig(**{f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name not in local})


def trainer_inputs(
    script_args: SFTDataArguments, args: SFTConfig, model_args: ModelConfig
) -> tuple[str, dict[str, Any]]:
    """The model's folder or id, and what a trainer takes besides it and `args`, whose `model_init_kwargs` are set."""
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing; give a hub id or a local folder.")
    overrides: Any = args.model_init_kwargs or {}
    model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    args.model_init_kwargs = {**model_init_kwargs, **overrides}
    evaluates = args.eval_strategy != "no"
    train_dataset = load_split(script_args, script_args.dataset_train_split, args.seed)
    given: dict[str, Any] = {
        "train_dataset": draw(train_dataset, script_args.dataset_max_samples, args.seed),
        "eval_dataset": load_split(script_args, script_args.dataset_test_split, args.seed) if evaluates else None,
    }
    given["peft_config"] = get_peft_config(model_args)
    given["quantization_config"] = get_quantization_config(model_args)
    model = resolve_model(model_args.model_name_or_path)
    set_seed(args.seed)  # adapters are drawn before the trainer sets its seed
    return model, given


def make_trainer(script_args: SFTScriptArguments, args: LoPTConfig, model_args: ModelConfig) -> SFTTrainer:
    """Builds the trainer of `method` from parsed arguments."""
    model, given = trainer_inputs(script_args, args, model_args)
    if script_args.method == "e2e":
        return SFTTrainer(model, end_to_end_args(args), **given)
    return LoPTTrainer(model, args, **given)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and, if asked to, pushes a model.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    script_args, args, model_args = parse_or_exit(make_parser(), argv)
    try:
        checkpoint = resumed_checkpoint(args)
        check_output_dir(args.output_dir, checkpoint)
        trainer = make_trainer(script_args, args, model_args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lopt-hf sft: {error}")
    train_and_save(trainer, checkpoint, script_args.dataset_name)


def train_and_save(trainer: SFTTrainer, checkpoint: str | None, dataset_name: str | None) -> None:
    """Trains, from a checkpoint if one is given, saves and, if asked to, pushes a model."""
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(trainer.args.output_dir)
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    # The process group's threads may still be giving back tensors, for which they need the interpreter.
    trainer.accelerator.state.destroy_process_group()


def resumed_checkpoint(args: SFTConfig) -> str | None:
    """The folder that `resume_from_checkpoint` means: `true` is the last checkpoint in output_dir, `auto` too if any.

    Raises:
        ValueError: If there is none.
    """
    value = str(args.resume_from_checkpoint or "false")
    if value.lower() == "false":
        return None
    wants_last = value.lower() in ("true", "auto")
    folder = str(args.output_dir) if wants_last else value
    checkpoint = folder if os.path.isdir(folder) else None
    if checkpoint is not None and wants_last:
        checkpoint = get_last_checkpoint(folder)
    if checkpoint is None and value.lower() != "auto":
        raise ValueError(
            f"resume_from_checkpoint={value}: there is no checkpoint at {folder!r}; name a checkpoint's folder, or "
            "leave it out to start anew ('auto' goes on from the last checkpoint if there is one)."
        )
    return checkpoint


if __name__ == "__main__":
    main()
