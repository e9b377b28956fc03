"""Measure what training costs on this machine.

`step` compares methods step by step: bytes saved for backward, time, resident memory. `repl` measures what a folded
RepL model saves where it is used.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lopt_hf.bench.repl import RepLBenchSettings, run_repl_bench
from lopt_hf.bench.repl import to_markdown as repl_table
from lopt_hf.bench.step import BenchWorkerError, StepBenchSettings, run_step_bench, to_json, to_markdown

__all__ = ["main", "make_parser"]

STEP_DESCRIPTION = """\
Train the same model on the same batches with several methods, one step of each at a time, and print what a step
costs: the bytes that autograd keeps for backward at the peak, the time (median), the peak resident memory; as a table,
then as JSON.

  e2e                SFTTrainer, no activation checkpointing: what the ratios refer to
  e2e_checkpointing  SFTTrainer with activation checkpointing (reentrant)
  lopt               LoPTTrainer; a row for each --num-blocks and --local-update-interval
  freeze             LoPTTrainer that leaves the early blocks frozen
  lora               SFTTrainer with a LoRA of rank 16 on all linear layers
  repl               SFTTrainer on a RepL model with every 4th layer replaced (not among the default methods)

Each method takes turns with an end-to-end run of its own: two processes at a time, with their weights and optimizer
states (SmolLM2-135M: 2 to 3 GB each). Ratios are to the steps taken in turns.
"""
STEP_EXAMPLE = """\
example:
  lopt-hf bench step --methods e2e,lopt --num-blocks 2,4 --batch-size 4 --seq-length 256 --output step.json
"""


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of integers such as 2,4") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "N"),
    int | None: (int, "N"),
    str: (str, "NAME"),
    tuple[int, ...]: (_integers, "N,N"),
    tuple[str, ...]: (_names, "NAME,NAME"),
}


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of `lopt-hf bench`; its namespace has the sub-command's `run` and `parser`."""
    parser = argparse.ArgumentParser(prog="lopt-hf bench", description=__doc__)
    commands = parser.add_subparsers(title="what to measure", required=True, metavar="COMMAND")
    step = commands.add_parser(
        "step",
        help="bytes, time and memory of one training step, by method",
        description=STEP_DESCRIPTION,
        epilog=STEP_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_settings(step, StepBenchSettings)
    step.add_argument("--output", type=Path, metavar="FILE", help="Write the JSON there instead of printing it.")
    step.set_defaults(run=_run_step, parser=step)
    repl = commands.add_parser(
        "repl",
        help="generation speed of a folded RepL model, and the time of its calibration",
        description="Generate with a model and with its folded RepL model in turns, after timing the calibration.",
    )
    _add_settings(repl, RepLBenchSettings)
    repl.set_defaults(run=_run_repl, parser=repl)
    return parser


def _add_settings(parser: argparse.ArgumentParser, settings: Any) -> None:
    """An option for each field of a settings dataclass."""
    for setting in fields(settings):
        reader, metavar = _READERS[setting.type]
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=reader,
            default=setting.default,
            metavar=metavar,
            help=setting.metadata["help"] + _default_text(setting.default),
        )


def _default_text(default: Any) -> str:
    if default is None:
        return ""
    return f" Default: {','.join(map(str, default)) if isinstance(default, tuple) else default}"


def _run_repl(arguments: argparse.Namespace) -> None:
    names = [setting.name for setting in fields(RepLBenchSettings)]
    print(repl_table(run_repl_bench(RepLBenchSettings(**{name: getattr(arguments, name) for name in names}))))


def _run_step(arguments: argparse.Namespace) -> None:
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise ValueError(f"output={arguments.output}: its folder does not exist; create it or name another file.")
    names = [setting.name for setting in fields(StepBenchSettings)]
    settings = StepBenchSettings(**{name: getattr(arguments, name) for name in names})
    results = run_step_bench(settings)
    print(to_markdown(results))
    if arguments.output is None:
        print(f"\n{to_json(results, settings)}")
    else:
        arguments.output.write_text(to_json(results, settings) + "\n")
        print(f"{arguments.output} has every step's numbers.", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `lopt-hf bench`.

    Args:
        argv: The arguments after the command's name. Default: those of the process.

    Raises:
        SystemExit: On bad input (status 2) or if a measurement fails (status 1), after one line on stderr.
    """
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ValueError as error:
        arguments.parser.error(str(error))
    except BenchWorkerError as error:
        sys.exit(f"{arguments.parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
