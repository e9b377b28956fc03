"""Supervised fine-tuning, or image classification, in a pipeline of local learners (PPLL): one process per stage.

```bash
lopt-hf pipeline --config smollm2-135m/pipeline/delayed_2       # the task's gradient, a step late; all on this host
lopt-hf pipeline --config smollm2-135m/pipeline/ppll_2          # a local objective
lopt-hf pipeline --config smollm2-135m/pipeline/ppll_mlaan_2    # early blocks learn by MLAAN
lopt-hf pipeline --task image --train_file train.parquet --eval_file test.parquet --output_dir out   # a small ViT
lopt-hf pipeline --method mlaan --help                                        # the options of that method
lopt-hf pipeline --task image --help                                          # those for image classifiers
accelerate launch --multi_gpu --num_processes 2 -m lopt_hf.scripts.pipeline --config ...
lopt-hf pipeline export --checkpoint out/checkpoint-100 --output-dir model    # a checkpoint as a stock model
lopt-hf pipeline simulate --help                                              # schedules compared, without a model
```

Launched by `accelerate launch`, a process is one stage; otherwise the command starts all stages on this host.
"""

import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser

from lopt_hf.common.adapters import adapter_config
from lopt_hf.common.parent import end_with_parent
from lopt_hf.common.resuming import find_checkpoint
from lopt_hf.common.settings import option
from lopt_hf.data.prepared import check_answers_fit
from lopt_hf.local.blocks import split_layers
from lopt_hf.pipeline.runtime.arguments import PipelineArguments
from lopt_hf.pipeline.runtime.checkpoint import Manifest, check_no_other_model, may_start_anew
from lopt_hf.pipeline.runtime.config import MLAANPipelineConfig, PipelineConfig
from lopt_hf.pipeline.runtime.cut_check import check_cut
from lopt_hf.pipeline.runtime.health import (
    PipelineError,
    describe_error,
    failure_status,
    report_bad_input,
    report_failure,
)
from lopt_hf.pipeline.runtime.launch import Rendezvous
from lopt_hf.pipeline.runtime.run import StageConfig, find_model, launch_stages, model_kwargs, run_stage
from lopt_hf.pipeline.runtime.stage import read_config
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from lopt_hf.scripts.launching import LAUNCHED, launch_if_asked
from lopt_hf.scripts.parsing import chosen, chosen_method, make_trl_parser, parse_or_exit, refuse_method
from lopt_hf.scripts.settings import UsageExit
from lopt_hf.scripts.sft import SFTDataArguments, load_split
from lopt_hf.scripts.training import check_model_options, load_checked, subsample
from lopt_hf.trainers.checks import check_no_model_is_lost, check_output_dir, check_run_settings

__all__ = ["main", "make_parser"]

SUBCOMMANDS = ("simulate", "export")


@dataclass
class LaunchArguments:
    """Method by which the early blocks learn, and how `lopt-hf pipeline` starts the stages on this host.

    Parameters:
        task: `"sft"`, or `"image"`, which has options of its own.
        method: `"lopt"` or `"mlaan"`; each has options of its own.
        devices: Ids of the accelerators to use.
    """

    task: str = option(
        "sft", "'sft' for language models, or 'image', whose options `--task image --help` shows.", ("sft", "image")
    )
    method: str = option("lopt", "'lopt', or 'mlaan', whose options `--method mlaan --help` shows.", ("lopt", "mlaan"))
    devices: str | None = option(None, "Ids of the accelerators of this host to use, such as 0,1. Default: all.")


_REFUSED_METHODS = {
    "e2e": "end-to-end training sends gradients back from stage to stage within a step, and here no stage waits for "
    "one; let them come late with `--gradient delayed`, or train in one process with `lopt-hf sft --method e2e`"
}


def make_parser(method: str = "lopt", task: str = "sft") -> TrlParser:
    """Makes the parser of this command: data, training, model and launch arguments, and `--config file.yaml`.

    Args:
        method: The method whose training arguments it takes.
        task: The task, likewise.
    """
    if task == "image":
        parser: TrlParser = _image().make_parser(__doc__ or "", method)
        return parser
    config_class = MLAANPipelineConfig if method == "mlaan" else PipelineConfig
    return make_trl_parser("pipeline", __doc__, SFTDataArguments, config_class, ModelConfig, LaunchArguments)


def _parse(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Parses the options of the task; those of data come first, then those of training and of the model."""
    if not _is_image(arguments):
        return parse_or_exit(make_parser(chosen_method(arguments)), arguments)
    asked = [chosen(name, arguments, "") for name in ("method", "local_objective", "gradient")]
    try:
        _image().check_objective(*asked)
    except ValueError as error:
        raise UsageExit(f"lopt-hf pipeline: error: {error}") from error
    return parse_or_exit(make_parser(asked[0], task="image"), arguments)


def _image() -> Any:
    """The part of the command for image classifiers; each process imports what it runs."""
    from lopt_hf.scripts import pipeline_image

    return pipeline_image


def _is_image(arguments: Sequence[str]) -> bool:
    return chosen("task", arguments, "sft") == "image"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one stage, or starts all of them on this host.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in SUBCOMMANDS:
        importlib.import_module(f"lopt_hf.scripts.pipeline_{arguments[0]}").main(arguments[1:])
        return
    refuse_method("pipeline", arguments, _image().REFUSED_METHODS if _is_image(arguments) else _REFUSED_METHODS)
    launch_if_asked("pipeline", arguments, lambda launched: _check(_parse(launched), launches=False))
    if "RANK" not in os.environ:
        parsed = _parse(arguments)
        _check(parsed, launches=True)
        args = parsed[1]
        # Chosen here, or each stage would time the machine while the others start
        dtype = [] if args.fp16 else ["--bf16", str(args.bf16).lower()]
        checked = {LAUNCHED: shlex.join(arguments)}
        sys.exit(launch_stages(args, [*arguments, *dtype], _launch_arguments(parsed).devices, checked))
    end_with_parent()
    try:
        rendezvous = Rendezvous.from_environment()
    except ValueError as error:
        raise UsageExit(f"lopt-hf pipeline: {error}") from error
    try:
        parsed = _parse(arguments)
        data_args, args, model_args, *_ = parsed
        if LAUNCHED not in os.environ:  # or the command that has launched the stages has looked
            _check_settings(parsed)
        if _is_image(arguments):
            _image().run_image_stage(data_args, args, model_args, rendezvous)
            return

        def load_dataset() -> Dataset | IterableDataset:
            rows = load_split(data_args, data_args.dataset_train_split, args.seed, args.dataset_text_field)
            return subsample(rows, data_args.dataset_max_samples, args.seed)

        run_stage(args, model_args, rendezvous, load_dataset)
    except SystemExit as error:
        if error.code:
            report_bad_input(rendezvous.store)
            report_failure(rendezvous.store, f"rank {rendezvous.rank} was given wrong arguments; see its own output")
        raise
    except ValueError as error:
        report_bad_input(rendezvous.store)
        reason = report_failure(rendezvous.store, f"rank {rendezvous.rank} failed: {error}")
        raise UsageExit(f"lopt-hf pipeline: rank {rendezvous.rank} stops: {reason}") from error
    except PipelineError:
        sys.exit(failure_status(rendezvous.store))  # the monitor has said why
    except Exception as error:
        report_failure(rendezvous.store, f"rank {rendezvous.rank} failed: {describe_error(error)}")
        raise


def _launch_arguments(parsed: Sequence[Any]) -> Any:
    """The group of parsed arguments in which `devices` is: of images that of the data."""
    return parsed[3] if len(parsed) > 3 else parsed[0]


def _check(parsed: Sequence[Any], launches: bool) -> None:
    """Ends the process with one line if the stages could not run.

    Args:
        parsed: The arguments.
        launches: Whether this command starts the stages by itself, and not by a configuration of `accelerate`.
    """
    data_args, args, model_args, *_ = parsed
    try:
        if not launches:
            _check_no_devices(parsed)
        _check_run(args, model_args, has_adapter=isinstance(model_args, ModelConfig) and model_args.use_peft)
        if isinstance(model_args, ModelConfig):
            _check_input(data_args, args, model_args)
        else:
            _image().check_images(data_args, args, model_args)
    except (ValueError, OSError, ImportError) as error:
        raise UsageExit(f"lopt-hf pipeline: {error}") from error


def _check_settings(parsed: Sequence[Any]) -> None:
    """Checks in a stage what is not found out by itself while it is made.

    Raises:
        ValueError: If an option does nothing, or a setting cannot be read.
    """
    _, args, model_args, *_ = parsed
    _check_no_devices(parsed)
    if isinstance(model_args, ModelConfig):
        check_model_options(model_args)
    try:
        check_run_settings(args)
    except ImportError as error:
        raise ValueError(str(error)) from error


def _check_no_devices(parsed: Sequence[Any]) -> None:
    devices = _launch_arguments(parsed).devices
    if devices is not None:
        raise ValueError(
            f"devices={devices!r} does nothing where `accelerate launch` is given its own settings; leave it out, and "
            "give the launcher gpu_ids."
        )


def _check_run(args: PipelineArguments, model_args: Any, has_adapter: bool) -> None:
    """Checks output folder, checkpoint and settings before anything is read."""
    output_dir = str(args.output_dir)
    folder = find_checkpoint(output_dir, args.resume_from_checkpoint)
    check_output_dir(output_dir, folder)
    if not has_adapter:
        check_no_other_model(Path(output_dir))
    if not may_start_anew(args):
        check_no_model_is_lost(output_dir, model_args.model_name_or_path)
    if folder is not None:
        assert args.num_stages is not None
        settings = {**args.gradient_settings(args.num_stages), "num_blocks": args.num_blocks}
        Manifest(folder).check_run(args.data_parallel, settings)
    check_run_settings(args)


def _check_input(data_args: SFTDataArguments, args: StageConfig, model_args: ModelConfig) -> None:
    """Reads what the stages will read: here an error in it is one line."""
    check_model_options(model_args)
    if data_args.dataset_streaming and args.max_steps < 1:
        raise ValueError(
            "dataset_streaming=True reads data whose length is not known, so that epochs cannot be counted; set "
            "max_steps."
        )
    load = partial(load_split, text_field=args.dataset_text_field)
    rows = load_checked(load, data_args, data_args.dataset_train_split, args.seed)
    rows = subsample(rows, data_args.dataset_max_samples, args.seed)
    model, num_layers = find_model(args, model_args)
    config, _ = read_config(model, **model_kwargs(args, model_args))
    # Measured times cut it in other places, but what can be cut in one can in another
    plans = plan_stages(split_layers(num_layers, args.num_blocks, args.split_at), int(args.num_stages or 0))
    check_cut(model, config, plans, adapter_config(model_args))
    check_answers_fit(rows, AutoTokenizer.from_pretrained(model, revision=model_args.model_revision), args)


if __name__ == "__main__":
    main()
