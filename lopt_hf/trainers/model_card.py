"""What TRL's model card does not tell: blocks, reach, data, command, and what was kept of the base's knowledge."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from lopt_hf import __version__
from lopt_hf.common.tables import markdown_table
from lopt_hf.local.blocks import Block
from lopt_hf.local.schedule import ReachSchedule

__all__ = ["Kept", "complete_card", "describe_reach", "describe_run", "is_users_readme", "read_retention"]

_BEFORE = "### Framework versions"  # of TRL's template
_PREFIX = "retention/"


@dataclass(frozen=True)
class Kept:
    """One metric of one task, before and after training.

    Attributes:
        task: The lm-eval task.
        metric: The metric.
        before: Its value of the untouched model.
        after: Its value of the trained one.
        low: Lower end of the change's interval.
        high: Upper end.
    """

    task: str
    metric: str
    before: float
    after: float
    low: float
    high: float


def is_users_readme(path: Path) -> bool:
    """Tells whether there is a README that no trainer has written."""
    return path.is_file() and _BEFORE not in path.read_text(encoding="utf-8", errors="replace")


def describe_run(trainer: Any, dataset_name: str | None = None) -> dict[str, str]:
    """Returns what to tell of a trainer of local learning, by its name; its `card_facts` come last."""
    return {
        "method": f"{trainer.trained_by}, of lopt_hf {__version__}",
        "blocks": _describe_blocks(trainer.all_blocks),
        "trained by the task loss": describe_reach(trainer.learner.schedule),
        **({} if dataset_name is None else {"data": dataset_name}),
        **trainer.card_facts,
    }


def _describe_blocks(blocks: Sequence[Block]) -> str:
    """Returns how many blocks there are and which layers are in each, both ends included."""
    ranges = ", ".join(f"{block.start}–{block.stop - 1}" for block in blocks)
    return f"{len(blocks)}, of layers {ranges}"


def describe_reach(schedule: ReachSchedule) -> str:
    """Returns which blocks the task loss trains."""
    if len(set(schedule.cycle)) == 1:
        reach = schedule.cycle[0]
        return "all blocks" if reach == schedule.num_blocks else f"the last {reach} of {schedule.num_blocks} blocks"
    over = {"step": "over steps", "microbatch": "over the micro-batches of a step", "run": "over the whole run"}
    return f"the last {', '.join(map(str, schedule.cycle))} of {schedule.num_blocks} blocks, {over[schedule.unit]}"


def read_retention(log_history: Iterable[Mapping[str, Any]]) -> list[Kept]:
    """Reads what `RetentionCallback` has logged last, with the untouched model's values; empty without it."""
    first: dict[str, float] = {}
    last: Mapping[str, Any] = {}
    for logs in log_history:
        names = [name for name in logs if name.startswith(_PREFIX)]
        for name in names:
            first.setdefault(name, logs[name])
        if any(name.endswith("_delta") for name in names):
            last = logs
    kept = []
    for name in (name for name in last if f"{name}_delta" in last):
        task, _, metric = name.removeprefix(_PREFIX).rpartition("/")
        kept.append(Kept(task, metric, first[name], last[name], last[f"{name}_low"], last[f"{name}_high"]))
    return kept


def complete_card(path: Path, facts: Mapping[str, str], kept: Sequence[Kept]) -> None:
    """Adds a section of facts to a card that TRL has written, and what was kept, there and to its metadata.

    Args:
        path: The card.
        facts: What to tell, by its name.
        kept: What was measured; goes into the metadata as `eval_results`, in the hub's `model-index`.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    rows = [[name, text.replace("|", r"\|")] for name, text in facts.items()]
    section = f"### Local learning\n\n{markdown_table(['', ''], rows, text_columns=(0, 1))}"
    if kept:
        section += "\n\n### What was kept\n\nOf the base's knowledge: the same samples before and after training.\n\n"
        section += markdown_table(
            ["task", "metric", "before", "after", "change"],
            [
                [row.task, row.metric, *(f"{value:.4g}" for value in (row.before, row.after)), _change(row)]
                for row in kept
            ],
        )
        card.data.eval_results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=row.task,
                dataset_name=row.task,
                metric_type=row.metric,
                metric_name=f"{row.metric}, {_change(row)} from the base",
                metric_value=row.after,
            )
            for row in kept
        ]
    before, heading, after = card.text.partition(_BEFORE)
    card.text = f"{before.rstrip()}\n\n{section}\n\n{heading}{after}"
    card.save(path)


def _change(row: Kept) -> str:
    return f"{row.after - row.before:+.4g} [{row.low:+.4g}, {row.high:+.4g}]"
