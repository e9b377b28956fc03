"""What `lopt-hf demo` shows at its end: the text of its report, and the curves of its run."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_hf.bench.step import StepResult, to_markdown
from lopt_hf.common.arithmetic import Arithmetic
from lopt_hf.common.figures import new_figure, save_figure
from lopt_hf.common.tables import markdown_table

__all__ = ["DemoResult", "Measurement", "Training", "plot_curves", "report"]

HEADROOM = 1.1  # of an axis, above its highest point


@dataclass(frozen=True)
class Measurement:
    """One model on the held-out problems and on general English.

    Attributes:
        answer_loss: Of the held-out problems' answers, in nats per token.
        exact_matches: Held-out problems whose answer is right.
        problems: How many there are.
        general_text_loss: Of general English, in nats per token.
        example: The answer to the first problem.
    """

    answer_loss: float
    exact_matches: int
    problems: int
    general_text_loss: float
    example: str


@dataclass(frozen=True)
class Training:
    """How long to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Problems of a step.
        note: Why so many, as one line.
    """

    steps: int
    batch_size: int
    note: str


@dataclass(frozen=True)
class DemoResult:
    """What the command found.

    Attributes:
        arithmetic: In which type the model was trained.
        training: How long.
        before: The model that it started from.
        after: The model that it ended with.
        step: What a step cost, end-to-end and with LoPT.
    """

    arithmetic: Arithmetic
    training: Training
    before: Measurement
    after: Measurement
    step: list[StepResult]


def comparison(before: Measurement, after: Measurement) -> str:
    """Makes the table of before and after in Markdown."""
    matches = f"exact match on {before.problems} held-out problems"
    rows = [
        ["loss of held-out answers, nats/token", *(f"{each.answer_loss:.3f}" for each in (before, after))],
        [matches, *(f"{each.exact_matches}/{each.problems}" for each in (before, after))],
        ["loss on general English, nats/token", *(f"{each.general_text_loss:.3f}" for each in (before, after))],
    ]
    return markdown_table(["", "before", "after"], rows)


def plot_curves(log_history: list[dict[str, Any]], result: DemoResult, path: Path) -> None:
    """Draws task loss and local losses over the steps, and the held-out loss at both ends."""
    rows = [row for row in log_history if "loss" in row]
    local_losses = sorted(key for key in rows[0] if key.startswith("local_loss/"))
    figure = new_figure(9 if local_losses else 4.5, 3.6)
    task, *others = figure.subplots(1, 1 + bool(local_losses), squeeze=False)[0]
    steps = [row["step"] for row in rows]
    task.plot(steps, [row["loss"] for row in rows], color="tab:blue", label="training")
    held_out = [result.before.answer_loss, result.after.answer_loss]
    task.plot([0, steps[-1]], held_out, "o", color="tab:red", label="held out")
    task.set(title="Task loss", xlabel="optimizer step", ylabel="nats per answer token")
    for local in others:
        for name in local_losses:
            local.plot(steps, [row[name] for row in rows], label=name.removeprefix("local_loss/").replace("_", " "))
        local.set(title="Reconstruction loss (early blocks)", xlabel="optimizer step", ylabel="mean squared error")
    for axes in (task, *others):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no half step
        values = [float(value) for line in axes.lines for value in line.get_ydata()]
        axes.set_ylim(0, HEADROOM * max(filter(math.isfinite, values), default=1.0) or 1.0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4, frameon=False)  # below: off the data
    save_figure(figure, path)


def report(options: argparse.Namespace, result: DemoResult, question: str, step: str) -> str:
    """Makes the text that the command ends with, which is kept as `report.md`.

    Args:
        options: The command's.
        result: What it found.
        question: The first of the held-out problems.
        step: The size of the step whose cost was measured.
    """
    folder, training, before, after = options.output_dir, result.training, result.before, result.after
    early = "" if options.early_learning_rate is None else f" (early blocks: {options.early_learning_rate:g})"
    method = "LoPT" if options.task_reach is None else f"Reach {','.join(map(str, options.task_reach))}"
    if options.task_reach is not None and options.reach_unit == "run":
        method += " over the run"
    return (
        f"## {method}, {options.num_blocks} blocks, {training.steps} steps of {training.batch_size} problems, "
        f"learning rate {options.learning_rate:g}{early}\n\n"
        f"{result.arithmetic}\n\n{training.note}\n\n"
        f"{comparison(before, after)}\n\n"
        f"## One training step of {step} beside end-to-end, measured in the same run\n\n"
        f"{to_markdown(result.step)}\n\n"
        f"## One held-out problem\n\n{question}\n\n"
        f"Before: {before.example.strip()}\n\nAfter: {after.example.strip()}\n\n"
        f"Model: {folder / 'model'} (stock checkpoint)\nCurves: {folder / 'curves.png'}\n"
        f"Report: {folder / 'report.md'}, figures: {folder / 'report.json'}\n"
        f"What it kept: lopt-hf retention --baseline {options.model} --model {folder / 'model'} --limit 100\n"
    )
