"""Tell what a training run will need, before a device is rented or a weight is downloaded.

Simulate a training step of each strategy on a model's configuration, without weights and without a GPU, and print
what it needs on a device at its peak, by what it is for; whether that fits; its arithmetic and relative time.

strategies (each without and with activation checkpointing, but for the segments):
  e2e              SFTTrainer
  lopt             LoPTTrainer, a row for each --num-blocks
  lopt_local_step  the same with local_step=True: each early block steps, and frees its gradients, before the next runs
  reach            LoPTTrainer whose task gradient reaches all blocks at some steps, the last one at the others
                   (--task-reach), without a local objective; means over the cycle, and its highest peak
  reach_local_step the same with local_step=True
  mlaan            MLAANTrainer, a row for each --num-blocks: the auxiliaries that its defaults make, windows of two
                   blocks (of two blocks in all: of one)
  freeze           LoPTTrainer that leaves the early blocks frozen
  lora             SFTTrainer with adapters on all linear layers
  repl             SFTTrainer on a RepL model with every 4th layer replaced
  ppll             PipelineTrainer, one stage on each of --num-gpus devices
  e2e_segments     SFTTrainer that checkpoints --num-blocks segments of the decoder, in place of layers
  e2e_step_in_backward  SFTTrainer whose optimizer steps in the backward, without clipping
  freeze_last      SFTTrainer that trains the first of --num-blocks blocks only
  lisa, badam      SFTTrainer that trains some layers at a time; of BAdam the mean over layers, and the highest peak
                   (these five, reach and joint are not among the default rows)
  joint            LoPT with one backward for all losses, as its released code has it

What is assumed: no padding, a label for every token, bf16 arithmetic, attention in a flash kernel of torch's
scaled_dot_product_attention, TRL's fused LM head, clipping; of a vision-language model sequences of text, the vision
tower there and frozen. What is not in it: the device's context, the allocator's
fragmentation and libraries' workspaces, for which --headroom keeps a share free.

examples:
  lopt-hf plan --model Qwen/Qwen2.5-7B-Instruct --device-memory 80GiB --batch-size 4 --seq-length 1024
  lopt-hf plan --model ./my-model --device-memory 24GB --optim adamw_8bit --write recipe.yaml --plot plan.png
  lopt-hf plan --model Qwen/Qwen3-4B --device-memory 80GiB --num-gpus 8 --strategies e2e,lopt,ppll
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from lopt_hf.common.figures import check_figure_path, save_figure
from lopt_hf.common.files import write_text
from lopt_hf.planner.device import DeviceSpeed, measure_speed, read_speed, write_speed
from lopt_hf.planner.dimensions import load_config
from lopt_hf.planner.plan import Plan, PlanSettings, make_plan
from lopt_hf.planner.recipe import make_recipe
from lopt_hf.planner.report import plot_plan, to_json, to_markdown
from lopt_hf.planner.strategies import Strategy
from lopt_hf.scripts.settings import OneLineParser, add_settings, check_output_files, read_settings
from lopt_hf.scripts.sft import WORD_PROBLEMS

__all__ = ["main", "make_parser"]


def make_parser() -> OneLineParser:
    """Makes the parser of `lopt-hf plan`."""
    parser = OneLineParser("plan", __doc__)
    add_settings(parser, PlanSettings)
    _add_files(parser.add_argument_group("files, none of which is overwritten"))
    return parser


def _add_files(group: argparse._ArgumentGroup) -> None:
    def add(name: str, text: str) -> None:
        group.add_argument(name, type=Path, metavar="FILE", help=text)

    add("--write", "Write the cheapest strategy that fits as a recipe (YAML).")
    group.add_argument("--dataset", metavar="NAME", help=f"Data of that recipe. Default: {WORD_PROBLEMS}")
    add("--output", "Write the plan as JSON.")
    add("--plot", "Draw the plan (PNG).")
    add("--calibrate", "Measure the speed of this machine's accelerator or CPU, save it and predict times by it.")
    add("--calibration", "Predict times by a speed that was saved before.")


def _check_files(arguments: argparse.Namespace) -> None:
    names = ("write", "output", "plot", "calibrate")
    check_output_files(arguments, names)
    check_figure_path("plot", arguments.plot)
    if arguments.dataset is not None and arguments.write is None:
        raise ValueError(
            f"dataset={arguments.dataset!r} is for the recipe that --write asks for; add it, or leave it out."
        )
    if arguments.reach_unit != PlanSettings.reach_unit and arguments.write is None:
        raise ValueError(
            f"reach_unit={arguments.reach_unit!r} is for the recipe that --write asks for; add it, or leave it out."
        )
    if arguments.calibrate is not None and arguments.calibration is not None:
        raise ValueError("calibrate measures and calibration reads a speed; give one of them.")


def _speed(arguments: argparse.Namespace) -> DeviceSpeed | None:
    if arguments.calibration is not None:
        return read_speed(arguments.calibration)
    if arguments.calibrate is None:
        return None
    speed = measure_speed()
    write_speed(speed, arguments.calibrate)
    return speed


def _run(arguments: argparse.Namespace) -> None:
    _check_files(arguments)
    settings = read_settings(arguments, PlanSettings)
    config = load_config(settings.model)  # before anything that takes time
    speed = _speed(arguments)
    plan = make_plan(settings, config, speed, _progress)
    print(to_markdown(plan))
    _write_files(arguments, plan)


def _progress(strategies: Sequence[Strategy]) -> Iterator[Strategy]:
    """Goes through the strategies, with a bar on stderr that names the one that is simulated."""
    with tqdm(strategies, file=sys.stderr, leave=False) as bar:
        for strategy in bar:
            bar.set_description(f"simulating {strategy.name}")
            yield strategy


def _write_files(arguments: argparse.Namespace, plan: Plan) -> None:
    if arguments.output is not None:
        write_text(arguments.output, to_json(plan) + "\n")
    if arguments.write is not None:
        _write_recipe(arguments, plan)
    if arguments.plot is not None:  # last, as it may lack its library
        save_figure(plot_plan(plan), arguments.plot)


def _write_recipe(arguments: argparse.Namespace, plan: Plan) -> None:
    if plan.cheapest is None:
        raise ValueError(f"write={str(arguments.write)!r}: no strategy fits, so there is no recipe to write.")
    recipe = make_recipe(plan, plan.cheapest, arguments.dataset or WORD_PROBLEMS)
    write_text(arguments.write, recipe.text)
    print(f"\nlopt-hf {recipe.command} --config {arguments.write}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `lopt-hf plan`.

    Args:
        argv: The arguments after the command's name. Default: those of the process.

    Raises:
        SystemExit: On bad input (status 2), after one line on stderr.
    """
    make_parser().run(_run, argv)


if __name__ == "__main__":
    main()
