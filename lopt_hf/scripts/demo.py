"""Fine-tune a real model on this machine in a few minutes, and see what changed.

SmolLM2-135M-Instruct learns generated arithmetic word problems; then the same measurements before and after: loss and
exact match on held-out problems, loss on general English, and what a step costs beside end-to-end training. That step
is measured first, and as many follow as fit in --minutes. The task loss trains all of the model in the first quarter
of the run and its last block after that; with --method lopt the last block only, and the first learns to reconstruct
its input.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lopt_hf.bench.processes import BenchWorkerError, one_gpu
from lopt_hf.bench.step import StepBenchSettings, run_step_bench
from lopt_hf.common.arithmetic import DTYPE_HELP, Arithmetic, choose_arithmetic
from lopt_hf.common.compared_methods import reach_cycle
from lopt_hf.common.evaluation import answer_loss, general_text, generate_answers, text_loss
from lopt_hf.common.files import write_text
from lopt_hf.common.settings import check_at_least, check_folder, option
from lopt_hf.data.pretrained import SMOLLM2_ID, resolve_model
from lopt_hf.data.word_problems import make_word_problems
from lopt_hf.rewards import last_number
from lopt_hf.scripts.demo_report import DemoResult, Measurement, Training, plot_curves, report
from lopt_hf.scripts.settings import OneLineParser, add_settings
from lopt_hf.trainers.configs import LoPTConfig
from lopt_hf.trainers.sft import LoPTTrainer

__all__ = ["main", "make_parser"]

BATCH_SIZE = 8
HELD_OUT = 32
TEXT_CHUNKS = 4  # of 512 tokens
# The step that is measured beside end-to-end training: half the tokens of one with 8 problems
BENCH_SEQUENCES, BENCH_TOKENS = 4, 128
TOKENS_PER_PROBLEM = 128  # padded to the longest of a batch; ours, rounded up from what the problems have
FEWEST_STEPS, MOST_STEPS = 12, 240  # ours: 8 steps just halve the loss; more than these belong into a real run
RECONSTRUCTION_RATE = 1e-5  # chosen on the held-out problems
FEW_PROBLEMS = 2  # of a step, where FEWEST_STEPS whole ones do not fit


@dataclass(frozen=True)
class DemoOptions:
    """Options of the command."""

    minutes: float = option(
        8.0,
        f"Time for everything after installing, within which there are as many steps of {BATCH_SIZE} problems as fit, "
        f"{MOST_STEPS} at most.",
    )
    steps: int | None = option(None, "Optimizer steps, however long they take.")
    dtype: str = option("auto", DTYPE_HELP)
    output_dir: Path = option(Path("lopt-demo"), "New folder.")
    model: str = option(SMOLLM2_ID, "Hub id or local folder.")
    method: str = option("reach", "reach or lopt.", choices=("reach", "lopt"))
    learning_rate: float = option(1e-4, "Peak rate.")
    early_learning_rate: float | None = option(
        None,
        f"Peak rate of the early blocks. Default: that of the last block; with --method lopt {RECONSTRUCTION_RATE:g}, "
        "since AdamW's step is as long as its rate, however small the gradient of a reconstruction.",
    )
    num_blocks: int = option(2, "Blocks of the decoder.")
    task_reach: tuple[int, ...] | None = option(
        None,
        "Blocks, counted from the last, that the task loss trains, each number for an equal part of --reach-unit. "
        "Default: all of them, then 1,1,1.",
    )
    reach_unit: str = option("run", "run, once, or step: a cycle over optimizer steps.", choices=("run", "step"))
    seed: int = option(0, "Seed of data and training.")


def make_parser() -> OneLineParser:
    """The parser of this command."""
    parser = OneLineParser("demo", __doc__)
    add_settings(parser, DemoOptions)
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises `ValueError` for options that cannot work, before anything is loaded."""
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps {options.steps} trains nothing; give at least 1.")
    for name in ("learning_rate", "early_learning_rate"):
        check_at_least(f"--{name.replace('_', '-')}", getattr(options, name), 0)
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes:g} is no time; give more than 0, such as 8.")
    check_folder("--output-dir", options.output_dir)
    if options.output_dir.is_dir() and any(options.output_dir.iterdir()):
        raise ValueError(f"--output-dir {options.output_dir} is not empty; name a new folder, or remove it.")


def find_model(name: str) -> str:
    """Finds the model before anything is written.

    Raises:
        ValueError: If there is no such model here or on the hub.
    """
    path = resolve_model(name)
    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--model {name} cannot be loaded; give a local folder that holds a model, or check the id and the "
            f"network. ({reason})"
        ) from error
    return path


def measure(model_path: str, rows: Sequence[dict[str, Any]], dtype: torch.dtype, label: str) -> Measurement:
    """Loads a stock checkpoint in a type and measures it."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [row["prompt"] for row in rows]
    answers = generate_answers(model, tokenizer, prompts, batch_size=HELD_OUT, description=f"answering, {label}")
    matches = sum(last_number(text) == int(row["answer"]) for text, row in zip(answers, rows, strict=True))
    return Measurement(
        answer_loss=answer_loss(model, tokenizer, rows),
        exact_matches=matches,
        problems=len(rows),
        general_text_loss=text_loss(model, tokenizer, general_text(), num_chunks=TEXT_CHUNKS),
        example=answers[0],
    )


def step_settings(options: argparse.Namespace, model_path: str, dtype: str) -> StepBenchSettings:
    """Makes the settings of a measurement of what a step costs, end-to-end and with the demo's method."""
    return StepBenchSettings(
        model=model_path,
        methods=("e2e", options.method),
        num_blocks=(options.num_blocks,),
        task_reach=options.task_reach,
        local_update_interval=(1,),
        batch_size=BENCH_SEQUENCES,
        seq_length=BENCH_TOKENS,
        steps=3,
        warmup=1,
        dtype=dtype,
    )


def plan_training(options: argparse.Namespace, step_seconds: float, seconds_left: float) -> Training:
    """Chooses as many steps as fit, or where these are too few the fewest, with fewer problems in each.

    Args:
        options: The command's.
        step_seconds: Time of a step of `BATCH_SIZE` problems.
        seconds_left: Time for all of them.
    """
    rate = f"at {step_seconds:.1f} s per step of {BATCH_SIZE} problems"
    if options.steps is not None:
        return Training(options.steps, BATCH_SIZE, f"{options.steps} steps, as asked for, {rate}.")
    fitting = max(0, int(seconds_left / step_seconds))
    if fitting >= FEWEST_STEPS:
        note = f"as many as fit into {options.minutes:g} minutes" if fitting <= MOST_STEPS else "which is the most"
        return Training(min(fitting, MOST_STEPS), BATCH_SIZE, f"{min(fitting, MOST_STEPS)} steps, {note}, {rate}.")
    enough = math.ceil(options.minutes + (FEWEST_STEPS * step_seconds - seconds_left) / 60)
    return Training(
        FEWEST_STEPS,
        FEW_PROBLEMS,
        f"This machine is too slow for a meaningful run in {options.minutes:g} minutes: {rate} there is time for "
        f"{fitting}, and fewer than {FEWEST_STEPS} teach too little. Instead come {FEWEST_STEPS} steps of "
        f"{FEW_PROBLEMS} problems, to show that everything works; what they teach says nothing of the method. "
        f"Whole steps need --minutes {enough}.",
    )


def stopped_at(training: Training, step: int) -> Training:
    """Returns what was trained, of what was planned: less where the time was up."""
    if step == training.steps:
        return training
    return replace(training, steps=step, note=f"{training.note} The time was up after {step}: steps took longer.")


class StopInTime(TrainerCallback):
    """Ends training when its time is up: steps can take longer than the one that was measured.

    Args:
        seconds: Time for all steps.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline = perf_counter() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= FEWEST_STEPS and perf_counter() > self._deadline:
            control.should_training_stop = True


def train(
    model_path: str,
    dataset: Dataset,
    options: argparse.Namespace,
    training: Training,
    arithmetic: Arithmetic,
    seconds: float = math.inf,
) -> list[dict[str, Any]]:
    """Fine-tunes, saves a stock checkpoint in `<output_dir>/model`, and returns the log history.

    Args:
        model_path: The model.
        dataset: The problems.
        options: The command's.
        training: How many steps.
        arithmetic: In which type.
        seconds: Time for the steps, at the end of which training ends.
    """
    reach: dict[str, Any] = {}
    if options.task_reach is not None:
        reach = {"task_reach": list(options.task_reach), "reach_unit": options.reach_unit, "local_objective": "none"}
    args = LoPTConfig(
        output_dir=str(options.output_dir / "model"),
        num_blocks=options.num_blocks,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        bf16=arithmetic.dtype == "bfloat16",
        learning_rate=options.learning_rate,
        early_learning_rate=options.early_learning_rate,
        **reach,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )
    rows = dataset.select(range(training.steps * training.batch_size)).select_columns(["prompt", "completion"])
    trainer = LoPTTrainer(model_path, args, train_dataset=rows, callbacks=[StopInTime(seconds)])
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def run(options: argparse.Namespace, arithmetic: Arithmetic) -> None:
    """Runs the demo from loading to report."""
    start = perf_counter()
    print(arithmetic, flush=True)
    model_path = find_model(options.model)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    problems = make_word_problems((options.steps or MOST_STEPS) * BATCH_SIZE, HELD_OUT, options.seed)
    rows = list(problems["test"])
    measuring = perf_counter()
    before = measure(model_path, rows, arithmetic.torch_dtype, "before")
    measuring = perf_counter() - measuring
    costs = run_step_bench(step_settings(options, model_path, arithmetic.dtype))
    step_seconds = costs[-1].step_seconds * BATCH_SIZE * TOKENS_PER_PROBLEM / (BENCH_SEQUENCES * BENCH_TOKENS)
    seconds_left = 60 * options.minutes - (perf_counter() - start) - measuring  # which is done once more at the end
    training, planned = plan_training(options, step_seconds, seconds_left), perf_counter()
    print(training.note, flush=True)
    seconds = math.inf if options.steps is not None else seconds_left - (perf_counter() - planned)
    log_history = train(model_path, problems["train"], options, training, arithmetic, seconds)
    training = stopped_at(training, max(row["step"] for row in log_history))
    after = measure(str(options.output_dir / "model"), rows, arithmetic.torch_dtype, "after")
    result = DemoResult(arithmetic, training, before, after, costs)
    question, step = rows[0]["prompt"][-1]["content"], f"{BENCH_SEQUENCES} x {BENCH_TOKENS} tokens"
    text = report(options, result, question, step)
    write_text(options.output_dir / "report.md", text)
    seconds = perf_counter() - start
    figures = {**asdict(result), "seconds": seconds}
    write_text(options.output_dir / "report.json", json.dumps(figures, indent=2))
    print(f"\n{text}\n{seconds / 60:.1f} minutes in all, {training.steps} steps.")
    plot_curves(log_history, result, options.output_dir / "curves.png")  # last, as it may lack its library


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    make_parser().run(_check_and_run, argv)


def _check_and_run(options: argparse.Namespace) -> None:
    if options.method == "lopt" and options.task_reach is not None:
        reach = ",".join(map(str, options.task_reach))
        raise ValueError(f"--task-reach {reach} is for --method reach, and --method is lopt; leave one out.")
    if options.method == "reach":
        options.task_reach = reach_cycle(options.num_blocks, options.task_reach)
    elif options.early_learning_rate is None:
        options.early_learning_rate = RECONSTRUCTION_RATE
    check_options(options)
    os.environ.update(one_gpu())
    step_settings(options, options.model, options.dtype)  # checks the blocks and their reach
    try:
        run(options, choose_arithmetic(options.dtype))
    except BenchWorkerError as error:
        sys.exit(f"lopt-hf demo: {error}")


if __name__ == "__main__":
    main()
