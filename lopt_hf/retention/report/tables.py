"""The tables of a retention report, in the form that lm-eval prints."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from pytablewriter import MarkdownTableWriter
from pytablewriter.typehint import String

from lopt_hf.retention.comparisons import chance_line
from lopt_hf.retention.results import Contrast, Delta, ModelResult, RetentionReport, arrow, main_outcomes

__all__ = [
    "Cell",
    "Table",
    "contrast_table",
    "interval_text",
    "level_text",
    "make_tables",
    "model_table",
    "overview_table",
    "signed_text",
    "to_markdown",
    "value_text",
]

MANY_MODELS = 4  # above this an overview comes first
NOTHING = "-"


class Cell(NamedTuple):
    """A cell of a table, with the verdict of the delta that it shows, if it shows one."""

    text: str
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its title; `headers` may repeat, as lm-eval's do."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_markdown(self) -> str:
        """Returns a heading and the table, by lm-eval's own writer."""
        writer = MarkdownTableWriter()
        writer.headers = [_markdown(header) for header in self.headers]
        writer.type_hints = [String] * len(self.headers)  # or 0.5000 becomes 0.5
        writer.value_matrix = [[_markdown(cell.text) for cell in row] for row in self.rows]
        return f"## {_markdown(self.title)}\n\n{writer.dumps()}"


def to_markdown(report: RetentionReport) -> str:
    """Returns the tables of a report as Markdown: an overview of many models or seeds, each model, and the contrasts.

    A last line tells how many of the tests stand out, and how many would by chance.

    Args:
        report: What to show.
    """
    tables = "\n".join(table.to_markdown() for table in make_tables(report))
    line = chance_line(report)
    return f"{tables}\n{line}\n" if line else tables


def make_tables(report: RetentionReport) -> list[Table]:
    """Returns the tables that `to_markdown` shows."""
    with_seeds = any(result.seeds for result in report.models)
    overview = [overview_table(report)] if with_seeds or len(report.models) > MANY_MODELS else []
    contrasts = [contrast_table(report)] if report.contrasts else []
    return [*overview, *(model_table(result, report.confidence) for result in report.models), *contrasts]


def overview_table(report: RetentionReport) -> Table:
    """Returns a table with one row for each model: gain, mean, and each task's main metric, as delta with interval."""
    outcomes = main_outcomes(report)
    with_seeds = any(result.seeds for result in report.models)
    headers = ["Model", *(f"{each.task} {each.metric} {arrow(each.higher_is_better)}" for each in outcomes)]
    rows = []
    for result in report.models:
        cells = [Cell(result.label)]
        for outcome in outcomes:
            cells.append(_gain_cell(result.gain) if outcome.kind == "gain" else _delta_cell(outcome.of(result)))
        rows.append((*cells, Cell(_count(result.seeds))) if with_seeds else tuple(cells))
    title = f"Overview: change from {report.baseline}, {level_text(report.confidence)} interval"
    return Table(title, (*headers, "Seeds") if with_seeds else tuple(headers), tuple(rows))


def model_table(result: ModelResult, confidence: float) -> Table:
    """Returns all results of one model: the task trained on, the mean over tasks, each task and metric.

    Args:
        result: The model.
        confidence: Level of its intervals.
    """
    headers = ["Tasks", "Metric", "", "Baseline", "", "Value", "Delta", f"{level_text(confidence)} interval", "n"]
    headers += ["Seeds"] if result.seeds else []
    with_changes = any(delta.p_value is not None or delta.right_to_wrong is not None for delta in result.deltas)
    headers += ["right to wrong / wrong to right", "McNemar p"] if with_changes else []
    entries = [(delta.task, delta) for delta in result.deltas]
    if result.mean:
        entries.insert(0, (result.mean.task, result.mean))
    if result.gain:
        entries.insert(0, (f"{result.gain.task} (task trained on)", result.gain))
    previous = ""
    rows = []
    for task, delta in entries:
        cells = [task if task != previous else "", *_delta_texts(delta)]
        cells += [_count(result.seeds)] if result.seeds else []
        cells += [_flips(delta), _p_text(delta.p_value)] if with_changes else []
        cells += [_p_text(delta.p_adjusted), _size_text(delta.detectable)]
        rows.append((*map(Cell, cells), Cell(delta.verdict, delta.verdict)))
        previous = task
    return Table(result.label, (*headers, "Holm p", "detectable", "Reading"), tuple(rows))


def contrast_table(report: RetentionReport) -> Table:
    """Returns the table of differences between methods that were trained with the same seeds."""
    headers = ["First", "Second", "Task", "Metric", "", "Difference", f"{level_text(report.confidence)} interval"]
    headers += ["Seeds", "Holm p", "detectable", "Better"]
    rows = tuple(map(_contrast_row, report.contrasts))
    return Table("Differences between methods: first minus second", tuple(headers), rows)


def value_text(value: float) -> str:
    """Formats a value with four decimals, as lm-eval does; nan as `-`."""
    return NOTHING if math.isnan(value) else f"{value:.4f}"


def signed_text(value: float) -> str:
    """Formats a difference with its sign; nan as `-`."""
    return NOTHING if math.isnan(value) else f"{round(value, 4) + 0.0:+.4f}"  # + 0.0: no negative zero


def level_text(confidence: float) -> str:
    """Formats a confidence level, such as `95 %`."""
    return f"{100 * confidence:g} %"


def interval_text(entry: Delta | Contrast) -> str:
    """Formats the confidence interval in brackets; as `-` if there is none."""
    if math.isnan(entry.low) or math.isnan(entry.high):
        return NOTHING
    return f"[{signed_text(entry.low)}, {signed_text(entry.high)}]"


def _delta_texts(delta: Delta) -> list[str]:
    change = [value_text(delta.baseline), "→", value_text(delta.value), signed_text(delta.delta), interval_text(delta)]
    return [delta.metric, arrow(delta.higher_is_better), *change, _sample_text(delta)]


def _contrast_row(contrast: Contrast) -> tuple[Cell, ...]:
    texts = [contrast.first, contrast.second, contrast.task, contrast.metric, arrow(contrast.higher_is_better)]
    texts += [signed_text(contrast.difference), interval_text(contrast), str(contrast.seeds)]
    texts += [_p_text(contrast.p_adjusted), _size_text(contrast.detectable), contrast.verdict]
    return tuple(map(Cell, texts))


def _gain_cell(gain: Delta | None) -> Cell:
    return Cell(f"{value_text(gain.value)} ({signed_text(gain.delta)})", gain.verdict) if gain else Cell(NOTHING)


def _delta_cell(delta: Delta | None) -> Cell:
    if delta is None:
        return Cell(NOTHING)
    return Cell(f"{signed_text(delta.delta)} {interval_text(delta)}", delta.verdict)


def _p_text(p_value: float | None) -> str:
    if p_value is None or math.isnan(p_value):
        return NOTHING
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _sample_text(delta: Delta) -> str:
    """Formats the number of samples, and of the clusters that they are in."""
    return str(delta.n) if delta.num_clusters is None else f"{delta.n} in {delta.num_clusters} clusters"


def _size_text(value: float) -> str:
    """Formats a size without a sign."""
    return NOTHING if math.isnan(value) else f"±{value:.4f}"


def _flips(delta: Delta) -> str:
    if delta.right_to_wrong is None or delta.wrong_to_right is None:
        return NOTHING
    return f"{delta.right_to_wrong} / {delta.wrong_to_right}"


def _count(seeds: tuple[ModelResult, ...]) -> str:
    return str(len(seeds)) if seeds else NOTHING


def _markdown(text: str) -> str:
    """Keeps markdown from taking `<b>` for a tag; a bare `<`, as in `<0.001`, is none."""
    return text.replace("<", r"\<") if ">" in text else text
