"""What the training commands share: data and method arguments, resuming, and a run from parsing to the saved model."""

import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, IterableDataset
from safetensors import SafetensorError
from transformers import Trainer, set_seed
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from lopt_hf.common.adapters import adapter_config
from lopt_hf.common.arithmetic import Arithmetic, arithmetic_of
from lopt_hf.common.distributed import end_training
from lopt_hf.common.files import is_disk_full
from lopt_hf.common.launching import INTERRUPTED
from lopt_hf.common.locks import FolderInUseError
from lopt_hf.common.parent import end_with_parent
from lopt_hf.common.resuming import find_checkpoint
from lopt_hf.common.settings import check_at_least, check_choice, check_left_out, option
from lopt_hf.data.loading import READ_ERRORS, NoHubError, SplitError, explain_damage, load_sft_dataset
from lopt_hf.data.mirror import DATA_DIR_HELP, say_once
from lopt_hf.data.prepared import check_prepared
from lopt_hf.data.pretrained import resolve_model
from lopt_hf.data.rows import RowError
from lopt_hf.scripts.card_facts import describe_data, is_of_hub, public_command
from lopt_hf.scripts.launching import launch_if_asked
from lopt_hf.scripts.parsing import parse_or_exit
from lopt_hf.scripts.presets import PRESETS, check_preset
from lopt_hf.scripts.settings import UsageExit
from lopt_hf.trainers.checks import check_no_model_is_lost, check_output_dir, check_run_settings
from lopt_hf.trainers.mixin import LocalLearningMixin
from lopt_hf.trainers.model_card import is_users_readme

__all__ = [
    "METHODS",
    "METHOD_HELP",
    "DataArguments",
    "MethodArguments",
    "check_model_options",
    "load_checked",
    "load_rows",
    "prepare",
    "run_training",
    "subsample",
]

logger = logging.getLogger(__name__)

METHODS = ["lopt", *PRESETS, "e2e"]
METHOD_HELP = (
    "'lopt' (local learning with every option below), 'reach' (the task loss trains all blocks in the run's first "
    "quarter, then the last half of the model), 'freeze' (the last block only), 'e2e' (TRL's plain trainer)"
)
LoadSplit = Callable[[Any, str, int], Any]
_OF_ADAPTERS = ("lora_", "use_rslora", "use_dora")
_OF_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
# The commands that generate data, by the data's name; in another one it would be looked for on the hub
GENERATED_BY = {"word-problems": "lopt-hf sft", "arithmetic": "lopt-hf dpo or grpo"}
GENERATED_SIZES = {"num_train": 512, "num_heldout": 64}  # ours: enough for the recipes on SmolLM2-135M


@dataclass
class DataArguments(ScriptArguments):
    """Which data to train on.

    Parameters:
        dataset_name: Hub id, local `.json`, `.jsonl` or `.parquet` file, or a name of data that the command generates.
        dataset_fallback: Generated data to train on where no hub answers, in place of those of `dataset_name`.
        data_dir: Folder with copies of the hub's data sets.
        dataset_max_samples: Train on this many rows, drawn with the run's seed.
        accelerate_config: The command starts itself by `accelerate launch` with this configuration.
    """

    dataset_name: str | None = option(None, "Hub id, local .json, .jsonl or .parquet file, or generated data.")
    dataset_fallback: str | None = option(
        None, "Name of generated data to take instead where no hub answers; one line says so. Default: none, an error."
    )
    data_dir: str | None = option(None, DATA_DIR_HELP)
    accelerate_config: str | None = option(
        None,
        "Start by `accelerate launch` with this configuration: a path, or a name such as ddp_2 or fsdp2_8 of `lopt-hf "
        "recipes`. --num_processes, --gpu_ids, --num_machines, --machine_rank, --main_process_ip and "
        "--main_process_port may follow, and win over the file.",
    )
    is_generated: bool = field(default=False, init=False)  # once the data are loaded
    # No option: TRL's script sets a list on the model that local learning sets too
    ignore_bias_buffers: bool = field(default=False, init=False)
    dataset_max_samples: int | None = option(None, "Train on this many rows, drawn with the run's seed. Default: all.")


@dataclass
class MethodArguments:
    """By which method to train.

    Parameters:
        method: `"lopt"`; `"reach"` or `"freeze"`, which are settings of it; or `"e2e"` for TRL's own trainer with
            the same arguments.
    """

    method: str = option("lopt", f"{METHOD_HELP}.", METHODS)


def load_rows(
    script_args: DataArguments, split: str, seed: int, generated: Mapping[str, Callable[..., DatasetDict]]
) -> Any:
    """Loads or generates one split of the data that `dataset_name` names.

    Where no hub answers for the data to train on, those of `dataset_fallback` take their place, in `script_args` too.

    Args:
        script_args: Which data.
        split: The split's name.
        seed: What generated data follow from.
        generated: By name what makes data instead of loading them, given `GENERATED_SIZES` and `seed`.

    Returns:
        `Dataset`, or `IterableDataset` with `dataset_streaming`.

    Raises:
        ValueError: If no data are named, if they do not have the split, or if options do nothing for them.
        FileNotFoundError: If the data cannot be found.
    """
    name, fallback = script_args.dataset_name, script_args.dataset_fallback
    if fallback is not None:
        check_choice("dataset_fallback", fallback, list(generated))
    if name is None:
        raise ValueError(
            "dataset_name is missing; give a hub id, a local .json, .jsonl or .parquet file, or "
            f"{' or '.join(map(repr, generated))} (generated)."
        )
    if name in GENERATED_BY and name not in generated and not Path(name).exists():
        raise ValueError(
            f"dataset_name={name!r} names data that {GENERATED_BY[name]} generates, and this command does not; choose "
            f"{' or '.join(map(repr, generated))} (generated), or give a hub id or a local file."
        )
    if name in generated and not script_args.is_generated:  # once they are, it may be in place of the hub's
        advice = f"does nothing for dataset_name={name!r}, which is generated; leave it out."
        check_left_out(script_args, ["dataset_config", "dataset_streaming"], advice)
    if name not in generated:
        where = script_args.dataset_config, split, script_args.dataset_streaming, script_args.data_dir
        try:
            return load_sft_dataset(name, *where)
        except NoHubError as error:
            # Only at first, or a run would train on the one and evaluate on the other
            if not generated or split != script_args.dataset_train_split:
                raise
            if fallback is None:
                names = " or ".join(map(repr, generated))
                raise NoHubError(
                    f"{error} To try the run on generated data set dataset_fallback to {names}."
                ) from error
        say_once(f"Data: no hub answers for {name}; this run takes {fallback!r} instead, which the package generates.")
        script_args.dataset_name = name = fallback
    script_args.is_generated = True
    splits = generated[name](**GENERATED_SIZES, seed=seed)
    if split not in splits:
        raise SplitError(f"dataset split {split!r} is unknown; {name} has {', '.join(splits)}.")
    return splits[split]


def subsample(dataset: Dataset | IterableDataset, max_samples: int | None, seed: int) -> Dataset | IterableDataset:
    """Draws `max_samples` rows from a data set; all, in their order, where it is `None`.

    Where there are fewer, a line says so.

    Raises:
        ValueError: If `max_samples` is not positive.
    """
    if max_samples is None:
        return dataset
    check_at_least("dataset_max_samples", max_samples, 1, "leaves nothing to train on")
    if isinstance(dataset, Dataset) and len(dataset) < max_samples:
        logger.warning("dataset_max_samples=%d, but there are %d rows: all are taken.", max_samples, len(dataset))
    return dataset.shuffle(seed=seed).take(max_samples)


def load_checked(load_split: LoadSplit, script_args: DataArguments, split: str, seed: int) -> Any:
    """Loads one split of the data, and says where an error is in them.

    Args:
        load_split: What loads it and brings it into a trainer's layout.
        script_args: Which data.
        split: The split's name.
        seed: What generated data follow from.

    Raises:
        ValueError: If the data cannot be read or trained on; names the data and the line or the split and the row.
        FileNotFoundError: If the data cannot be found.
    """
    try:
        return load_split(script_args, split, seed)
    except RowError as error:
        raise RowError(f"dataset_name={script_args.dataset_name}, split {split!r}, {error}") from error
    except SplitError as error:
        is_train = split == script_args.dataset_train_split
        fix = "dataset_train_split" if is_train else "eval_strategy to 'no', or dataset_test_split"
        raise ValueError(f"{error} Set {fix} to one that there is.") from error
    except READ_ERRORS as error:  # of a stream's first row
        raise ValueError(explain_damage(str(script_args.dataset_name), error)) from error


def check_model_options(model_args: ModelConfig) -> None:
    """Checks that nothing is said of an adapter or of 4 bits that are not asked for.

    Raises:
        ValueError: If an option would do nothing.
    """
    if not model_args.use_peft:
        names = [name for name in ModelConfig.__dataclass_fields__ if name.startswith(_OF_ADAPTERS)]
        check_left_out(model_args, names, "does nothing without use_peft; add --use_peft, or leave it out.")
    if not model_args.load_in_4bit:
        check_left_out(model_args, _OF_4BIT, "does nothing without load_in_4bit; add --load_in_4bit, or leave it out.")


def prepare(
    script_args: DataArguments, args: Any, model_args: ModelConfig, load_split: LoadSplit
) -> tuple[str, dict[str, Any]]:
    """Finds the model and loads the data.

    Args:
        script_args: Which data.
        args: Training arguments; how to load the model is added to them.
        model_args: Which model.
        load_split: Called with the script's arguments, a split's name and the seed.

    Returns:
        The model's folder or id, and the trainer's keyword arguments for data, adapter and quantisation.

    Raises:
        ValueError: If the model or the data is missing.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing; give a hub id or a local folder.")
    if isinstance(script_args, MethodArguments):
        check_preset(script_args.method, args)
    check_model_options(model_args)
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    evaluates = args.eval_strategy != "no" or args.eval_on_start

    train_dataset = load_checked(load_split, script_args, script_args.dataset_train_split, args.seed)
    train_dataset = subsample(train_dataset, script_args.dataset_max_samples, args.seed)
    if script_args.dataset_max_samples is not None and isinstance(train_dataset, Dataset):
        script_args.dataset_max_samples = len(train_dataset)  # what the card tells
    test_split = script_args.dataset_test_split
    given: dict[str, Any] = {
        "train_dataset": train_dataset,
        "eval_dataset": load_checked(load_split, script_args, test_split, args.seed) if evaluates else None,
        "peft_config": adapter_config(model_args),
        "quantization_config": get_quantization_config(model_args),
    }
    model = resolve_model(model_args.model_name_or_path)
    set_seed(args.seed)  # adapters are drawn before the trainer sets its seed
    return model, given


def run_training(
    parser: TrlParser, argv: Sequence[str] | None, make_trainer: Callable[[Any, Any, Any], Trainer]
) -> None:
    """Trains, saves and, if asked to, pushes a model; at the end the process group is gone.

    Args:
        parser: The command's parser, of script, training and model arguments.
        argv: Arguments without the program's name; default: those of the process.
        make_trainer: Builds the trainer from the parsed arguments.
    """
    command = parser.prog.rpartition(" ")[2]
    launch_if_asked(command, argv, check=lambda arguments: parse_or_exit(parser, arguments))
    script_args, args, model_args = parse_or_exit(parser, argv)
    end_with_parent()
    try:
        checkpoint = find_checkpoint(str(args.output_dir), args.resume_from_checkpoint)
        check_output_dir(args.output_dir, checkpoint)
        # `auto` may start anew in the folder of a run of its own
        if str(args.resume_from_checkpoint or "false").lower() == "false":
            check_no_model_is_lost(args.output_dir, model_args.model_name_or_path)
        check_run_settings(args)
        trainer: Any = make_trainer(script_args, args, model_args)
        if checkpoint is not None and hasattr(trainer, "check_checkpoint"):  # TRL's own have none
            trainer.check_checkpoint(checkpoint)
        for name in ("train_dataset", "eval_dataset"):
            check_prepared(getattr(trainer, name), args, name)
    except (ValueError, OSError, ImportError) as error:
        raise UsageExit(f"{parser.prog}: {error}") from error
    if isinstance(trainer, LocalLearningMixin):
        trainer.card_facts = {"data": describe_data(script_args), "command": f"`{public_command(command, argv)}`"}
    trainer.accelerator.print(_arithmetic_of(trainer), flush=True)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(args.output_dir)
        trainer.save_state()  # what was logged: `lopt-hf curves` draws it
        _write_card(trainer, script_args)
    except READ_ERRORS as error:  # of a stream, which is read while it trains
        raise UsageExit(f"{parser.prog}: {_explain(error, script_args.dataset_name)}") from error
    except KeyError as error:
        if "metric_for_best_model" not in str(error):  # how transformers says that it is not measured
            raise
        raise UsageExit(f"{parser.prog}: {_explain_metric(trainer)}") from error
    except KeyboardInterrupt:
        trainer.accelerator.print(f"\n{parser.prog}: {_what_is_kept(trainer)}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except FloatingPointError as error:  # the loss has diverged
        sys.exit(f"{parser.prog}: {error}")
    except FolderInUseError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(args.output_dir).free
        sys.exit(
            f"{parser.prog}: the disk of output_dir={args.output_dir!r} is full ({free / 2**20:.0f} MiB free): "
            f"{str(error).splitlines()[0]}. What is complete is kept; free some room, and resume or start anew."
        )
    trainer.accelerator.print(f"Model saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name if is_of_hub(script_args) else None)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    end_training(trainer)


def _write_card(trainer: Any, script_args: DataArguments) -> None:
    """Writes the model card, unless a README of the user's is there."""
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero() and not is_users_readme(folder / "README.md"):
        trainer.create_model_card(
            model_name=folder.absolute().name,
            dataset_name=script_args.dataset_name if is_of_hub(script_args) else None,
        )


def _what_is_kept(trainer: Any) -> str:
    """What is there of a run that was interrupted, and how it goes on."""
    checkpoint = find_checkpoint(trainer.args.output_dir, "auto")
    kept = (
        "no checkpoint has been saved"
        if checkpoint is None
        else f"the same command with --resume_from_checkpoint true goes on from {checkpoint}"
    )
    return f"interrupted after step {trainer.state.global_step}; {kept}."


def _explain_metric(trainer: Any) -> str:
    """What can be named as metric in place of one that an evaluation, the last thing logged, has not measured."""
    logged = [name.removeprefix("eval_") for name in trainer.state.log_history[-1] if name.startswith("eval_")]
    measured = [name for name in logged if name != "runtime" and not name.endswith("_per_second")]
    return (
        f"metric_for_best_model={trainer.args.metric_for_best_model!r} is not measured; choose one of "
        f"{', '.join(measured)}. Training stops at the first evaluation, after step {trainer.state.global_step}."
    )


def _explain(error: BaseException, dataset_name: str | None) -> str:
    """What is wrong with the data of a stream, which an error while training tells."""
    if isinstance(error, RowError):
        return str(error).rpartition("RowError: ")[2].strip()  # a worker of the data loader puts its traceback before
    return explain_damage(str(dataset_name), error)


def _arithmetic_of(trainer: Trainer) -> Arithmetic:
    weights = str(cast(Any, trainer.model).dtype).removeprefix("torch.")
    return arithmetic_of(trainer.accelerator.mixed_precision, weights, trainer.accelerator.device.type)
