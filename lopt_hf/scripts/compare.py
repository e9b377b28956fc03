"""Fine-tune by several methods, rates and seeds, and see what each learned and what it forgot.

One YAML names the data, the methods (arguments of `lopt-hf sft`), the learning rates, the seeds and the lm-eval tasks.
The command trains every combination, measures each model and the untouched base on the same samples, and writes a
report: task gain against retention, with intervals over samples and seeds. Stopped at any moment and run again, it
goes on where it was.
"""

import argparse
import importlib
import logging
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lopt_hf.common.packaged import find_config
from lopt_hf.compare.budget import BudgetedRuns, BudgetRecord, complete_runs, parse_budget
from lopt_hf.compare.experiment import GridEvaluation
from lopt_hf.compare.grid import Grid, GridRun, load_grid
from lopt_hf.compare.grid_data import prepare_data
from lopt_hf.compare.grid_training import GridTrainingError, check_trained_runs, train_grid, train_runs
from lopt_hf.data.mirror import DATA_DIR_HELP
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.report.report import check_plots, check_report_folder
from lopt_hf.retention.weights import check_files
from lopt_hf.scripts.parsing import check_setting
from lopt_hf.scripts.retention import tell_replaced, write_results
from lopt_hf.scripts.settings import OneLineParser

__all__ = ["main", "make_parser"]

EPILOG = """\
settings of the YAML:
{settings}

examples:
  lopt-hf compare --config smollm2-135m/retention/gsm8k
  lopt-hf compare --config smollm2-135m/retention/gsm8k --budget minutes=180   # again with the same line to go on

Each run keeps its model in <output_dir>/runs, so that it can be looked at and measured again: the disk needs room for
methods x learning rates x seeds of them.
"""


def make_parser() -> OneLineParser:
    """Makes the parser of this command."""
    lines = (f"  {setting.name:<16} {setting.metadata['help']}" for setting in fields(Grid))
    settings = "\n".join(textwrap.fill(line, 110, subsequent_indent=" " * 19) for line in lines)
    parser = OneLineParser("compare", __doc__, EPILOG.format(settings=settings))
    parser.add_argument("--config", type=Path, required=True, help="the YAML with the settings below")
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help=DATA_DIR_HELP)
    parser.add_argument("--output-dir", help="in place of the file's")
    parser.add_argument("--dtype", metavar="NAME", help="auto, float32 or bfloat16, in place of the file's")
    parser.add_argument("--workers", type=int, help="fine-tuning runs at a time, in place of the file's")
    parser.add_argument(
        "--budget",
        metavar="minutes=N",
        help="train and measure what fits into so much time (minutes=180, hours=3), all methods of a seed before the "
        "next; says what that is after the first run, and reports on the seeds that are complete",
    )
    return parser


def run(options: argparse.Namespace, command: str) -> None:
    """Trains and evaluates the grid, and writes and prints the report.

    Args:
        options: Parsed arguments.
        command: The command line, for the report.
    """
    seconds = None if options.budget is None else parse_budget(options.budget)
    overrides = {name: getattr(options, name) for name in ("data_dir", "output_dir", "workers", "dtype")}
    config = find_config(options.config)
    grid = load_grid(config, **overrides)
    try:
        check_arguments(grid)
    except ValueError as error:
        raise ValueError(f"config={config}: {error}") from error
    has_earlier = check_report_folder(grid.output_path, "lopt-hf compare", may_hold_others=True)
    check_plots()
    prepare_data(grid)
    check_files(ModelReference.find(grid.model))
    evaluation = GridEvaluation(grid)  # before training: tasks that cannot be loaded are found at once
    print(evaluation.describe_arithmetic(), flush=True)
    if has_earlier:
        tell_replaced(grid.output_path)
    if seconds is not None:
        _run_within(seconds, grid, evaluation, command)
        return
    train_grid(grid)
    write_results(evaluation.report(), evaluation.flips(), grid.output_path, command)


def check_arguments(grid: Grid) -> None:
    """Checks the names and types of all methods' arguments, which are those of other commands.

    Raises:
        ValueError: At the first that its command does not take; names the method, the argument, its value and the fix.
    """
    first_runs = {run.method: run for run in reversed(grid.runs()) if run.source is None}
    for method, options in grid.methods.items():
        if method in first_runs:
            _check_arguments(first_runs[method], options, grid.training)


def _check_arguments(run: GridRun, options: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """As `check_arguments`, those of one method."""
    module = importlib.import_module(f"lopt_hf.scripts.{run.command}")
    has_methods = run.command in ("sft", "pipeline")  # with options of their own
    parser = module.make_parser(*([run.arguments.get("method", "lopt")] if has_methods else []))
    for name, value in run.command_arguments.items():
        if name == "env":  # which TRL's parser takes beside the options
            continue
        try:
            check_setting(parser, name, value)
        except ValueError as error:
            if name in training and name not in options:
                raise ValueError(f"training.{error} Method {run.method!r} is trained with it.") from error
            raise ValueError(f"methods.{run.method}.{error}") from error


def _run_within(seconds: float, grid: Grid, evaluation: GridEvaluation, command: str) -> None:
    """As `run`, with what fits into a time.

    Raises:
        GridTrainingError: After the report on all that is complete, if some runs failed.
    """
    check_trained_runs(grid)
    path = grid.output_path / "budget.json"
    record, measured = BudgetRecord.read(path), evaluation.measured()
    if record.measured not in (None, measured):
        print(f"Budget: tasks, samples, type or versions are not those of {path}: all is measured anew.", flush=True)
        record = BudgetRecord(train=record.train)
    record.measured = measured
    budgeted = BudgetedRuns(
        *(grid, seconds, record, path),
        train=lambda runs: train_runs(grid, runs),
        measure=lambda run: evaluation.measure(run),
        measure_base=lambda: evaluation.measure_base(),
        say=lambda line: print(line, flush=True),
    )
    if record.base is None:
        record.load, record.base = evaluation.time_base()
    record.write(path)
    budgeted.begin()
    evaluation = evaluation.with_share(record.share or 1.0)
    failures = budgeted.run()
    runs = complete_runs(grid, {run.name: budgeted.is_done(run) for run in grid.runs()})
    write_results(evaluation.report(runs), evaluation.flips(runs), grid.output_path, command)
    if failures:
        raise GridTrainingError("\n".join(failures))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    command = shlex.join(["lopt-hf", "compare", *arguments])
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        make_parser().run(lambda options: run(options, command), arguments)
    except GridTrainingError as error:
        sys.exit(f"lopt-hf compare: {error}\nThe other runs are kept; correct the cause and run it again.")


if __name__ == "__main__":
    main()
