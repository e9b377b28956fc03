"""Fine-tune a real model on this machine in a few minutes, and see what changed.

SmolLM2-135M-Instruct learns generated arithmetic word problems with LoPT; then the same measurements before and after:
loss and exact match on held-out problems, loss on general English, and what a step costs beside end-to-end training.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt_hf.bench.step import StepBenchSettings, StepResult, run_step_bench, to_markdown
from lopt_hf.common.evaluation import answer_loss, general_text, generate_answers, text_loss
from lopt_hf.data.pretrained import SMOLLM2_ID, resolve_model
from lopt_hf.data.word_problems import extract_answer, make_word_problems
from lopt_hf.trainers.configs import LoPTConfig
from lopt_hf.trainers.sft import LoPTTrainer

__all__ = ["main", "make_parser"]

BATCH_SIZE = 8
HELD_OUT = 64
EXACT_MATCH_PROBLEMS = 32


@dataclass(frozen=True)
class Measurement:
    """One model on the held-out problems and on general English; losses in nats per token."""

    answer_loss: float
    exact_matches: int
    general_text_loss: float
    example: str


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog="lopt-hf demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of 8 problems (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("lopt-demo"), help="new folder (default: %(default)s)")
    parser.add_argument("--model", default=SMOLLM2_ID, help="hub id or local folder (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak rate (default: %(default)s)")
    parser.add_argument(
        "--early-learning-rate",
        type=float,
        default=1e-5,
        help="peak rate of the early blocks: AdamW's step is as long as its rate, however small the gradient "
        "(default: %(default)s)",
    )
    parser.add_argument("--num-blocks", type=int, default=2, help="blocks of the decoder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and training (default: %(default)s)")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises `ValueError` for options that cannot work, before anything is loaded."""
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps} trains nothing; give at least 1.")
    if options.output_dir.exists() and (not options.output_dir.is_dir() or any(options.output_dir.iterdir())):
        raise ValueError(f"--output-dir {options.output_dir} is not empty; name a new folder, or remove it.")


def measure(model_path: str, rows: Sequence[dict[str, Any]], label: str) -> Measurement:
    """Loads a stock checkpoint in bf16 and measures it."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    asked = rows[:EXACT_MATCH_PROBLEMS]
    answers = generate_answers(model, tokenizer, [row["prompt"] for row in asked], description=f"answering, {label}")
    matches = sum(extract_answer(text) == row["answer"] for text, row in zip(answers, asked, strict=True))
    return Measurement(
        answer_loss=answer_loss(model, tokenizer, rows),
        exact_matches=matches,
        general_text_loss=text_loss(model, tokenizer, general_text(), num_chunks=8),
        example=answers[0],
    )


def train(model_path: str, dataset: Dataset, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fine-tunes with LoPT, saves a stock checkpoint in `<output_dir>/model`, and returns the log history."""
    args = LoPTConfig(
        output_dir=str(options.output_dir / "model"),
        num_blocks=options.num_blocks,
        max_steps=options.steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=options.learning_rate,
        early_learning_rate=options.early_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )
    trainer = LoPTTrainer(model_path, args, train_dataset=dataset.select_columns(["prompt", "completion"]))
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def comparison(before: Measurement, after: Measurement) -> str:
    """The before-and-after table in markdown."""
    rows = [
        ("loss of held-out answers, nats/token", f"{before.answer_loss:.3f}", f"{after.answer_loss:.3f}"),
        (
            f"exact match on {EXACT_MATCH_PROBLEMS} held-out problems",
            f"{before.exact_matches}/{EXACT_MATCH_PROBLEMS}",
            f"{after.exact_matches}/{EXACT_MATCH_PROBLEMS}",
        ),
        (
            "loss on general English, nats/token",
            f"{before.general_text_loss:.3f}",
            f"{after.general_text_loss:.3f}",
        ),
    ]
    lines = ["| | before | after |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def plot_curves(log_history: list[dict[str, Any]], before: Measurement, after: Measurement, path: Path) -> None:
    """Draws task loss and local losses over the steps, and the held-out loss at both ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    task, local = figure.subplots(1, 2)
    rows = [row for row in log_history if "loss" in row]
    steps = [row["step"] for row in rows]
    task.plot(steps, [row["loss"] for row in rows], color="tab:blue", label="training")
    task.plot([0, steps[-1]], [before.answer_loss, after.answer_loss], "o", color="tab:red", label="held out")
    task.set(title="Task loss (last block)", xlabel="optimizer step", ylabel="nats per answer token")
    task.legend()
    for name in sorted(key for key in rows[0] if key.startswith("local_loss/")):
        local.plot(steps, [row[name] for row in rows], label=name.removeprefix("local_loss/"))
    local.set(title="Reconstruction loss (early blocks)", xlabel="optimizer step", ylabel="mean squared error")
    local.legend()
    for axes in (task, local):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)


def report(
    options: argparse.Namespace,
    question: str,
    before: Measurement,
    after: Measurement,
    costs: list[StepResult],
) -> str:
    """The text that the command ends with; also kept as `report.md`."""
    folder = options.output_dir
    return (
        f"## LoPT, {options.num_blocks} blocks, {options.steps} steps of {BATCH_SIZE} problems, learning rate "
        f"{options.learning_rate:g} (early block: {options.early_learning_rate:g})\n\n"
        f"{comparison(before, after)}\n\n"
        "## One training step beside end-to-end, measured now in the same run\n\n"
        f"{to_markdown(costs)}\n\n"
        f"## One held-out problem\n\n{question}\n\n"
        f"Before: {before.example.strip()}\n\nAfter: {after.example.strip()}\n\n"
        f"Model: {folder / 'model'} (stock checkpoint)\nCurves: {folder / 'curves.png'}\n"
        f"Report: {folder / 'report.md'}, figures: {folder / 'report.json'}\n"
        f"What it kept: lopt-hf retention --baseline {options.model} --model {folder / 'model'}\n"
    )


def run(options: argparse.Namespace) -> None:
    """Runs the demo from loading to report."""
    check_options(options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    model_path = resolve_model(options.model)
    problems = make_word_problems(max(options.steps * BATCH_SIZE, BATCH_SIZE), HELD_OUT, options.seed)
    rows = list(problems["test"])
    costs = run_step_bench(
        StepBenchSettings(
            model=model_path,
            methods=("e2e", "lopt"),
            num_blocks=(options.num_blocks,),
            local_update_interval=(1,),
            steps=5,
        )
    )
    before = measure(model_path, rows, "before")
    log_history = train(model_path, problems["train"], options)
    after = measure(str(options.output_dir / "model"), rows, "after")
    plot_curves(log_history, before, after, options.output_dir / "curves.png")
    text = report(options, rows[0]["prompt"][-1]["content"], before, after, costs)
    (options.output_dir / "report.md").write_text(text, encoding="utf-8")
    figures = {"before": asdict(before), "after": asdict(after), "step": [asdict(cost) for cost in costs]}
    (options.output_dir / "report.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(f"\n{text}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    options = make_parser().parse_args(argv)
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lopt-hf demo: {error}")


if __name__ == "__main__":
    main()
