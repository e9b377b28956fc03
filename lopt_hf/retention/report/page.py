"""A retention report as one HTML page that needs nothing beside it."""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lopt_hf.retention.report.findings import Finding, Statement, findings
from lopt_hf.retention.report.frontier import frontier_labels, retention_outcomes
from lopt_hf.retention.report.outcomes import main_outcomes
from lopt_hf.retention.report.page_style import STYLE
from lopt_hf.retention.report.tables import Cell, Table, level_text, make_tables
from lopt_hf.retention.results import RetentionReport

__all__ = ["render_page"]

MAX_VALUES = 20  # of a list among the settings
MAX_OPEN_TABLES = 4  # more tables of single models are folded
TEXT_COLUMNS = ("", "Model", "Tasks", "Task", "Metric", "First", "Second", "Better", "Reading")
WRAPPED_COLUMNS = ("Model", "First", "Second", "Better")
BEYOND_EDGE = "What lies far from all others stands at the panel's edge, hollow, with its values."


def render_page(report: RetentionReport, plots: Mapping[str, bytes]) -> str:
    """Renders the page, with style and plots inside it.

    Args:
        report: What to show.
        plots: PNG files by name, out of `deltas.png`, `frontier.png` and `drift.png`.
    """
    title = escape(f"What was kept and gained, compared with {report.baseline}")
    sections = [
        f"<h1>{title}</h1>",
        _introduction(report),
        _section("How to read this", _reading_guide(report)),
        _section("Findings", _findings_html(findings(report))),
        _section("Plots", "".join(_figure_html(report, name, image) for name, image in plots.items())),
        _section("Tables", _tables_html(report)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _introduction(report: RetentionReport) -> str:
    number = len(report.models)
    models = "1 fine-tuned model" if number == 1 else f"{number} fine-tuned models"
    most_seeds = max((len(result.seeds) for result in report.models), default=0)
    seeds = f", each the mean over up to {most_seeds} seeds" if most_seeds else ""
    samples = {delta.task: delta.n for result in report.models for delta in result.deltas}
    tasks = ", ".join(f"{task} ({size} samples)" for task, size in samples.items())
    text = f"{models}{seeds}, measured on the same samples as the baseline {report.baseline}: {tasks}."
    gains = [result.gain for result in report.models if result.gain]
    if gains:
        text += f" The gain is measured on {gains[0].n} {gains[0].task} of the task trained on, in nats per token."
    settings = f"<details><summary>Settings, versions and machine</summary>{_value_html(report.settings)}</details>"
    return f"<p>{escape(text)}</p>\n" + (settings if report.settings else "")


def _value_html(value: Any) -> str:
    """A setting: mappings become definition lists, long lists are cut."""
    if isinstance(value, Mapping):
        entries = (f"<dt>{escape(str(name))}</dt><dd>{_value_html(entry)}</dd>" for name, entry in value.items())
        return f"<dl>{''.join(entries)}</dl>" if value else "-"
    if isinstance(value, list | tuple):
        texts = [_value_html(entry) for entry in value[:MAX_VALUES]]
        texts += [f"and {len(value) - MAX_VALUES} more, see report.json"] * (len(value) > MAX_VALUES)
        return ("<br>" if any("," in text for text in texts) else ", ").join(texts) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else escape(f"{value:g}" if isinstance(value, float) else str(value))


CONTRASTS = (
    "<b>At the same gain.</b> A method that learned less may have forgotten less for that reason alone. So a method's "
    "points are also compared with the straight line from the baseline through the other's learning rates, at the "
    "point's gain. Where forgetting grows faster than gain, the line lies below the true curve, which favours the "
    "first method. The gains are taken as measured; beyond the line's end nothing is compared."
)


def _reading_guide(report: RetentionReport) -> str:
    level = level_text(report.confidence)
    number = sum(len(result.deltas) + bool(result.mean) for result in report.models) + len(report.contrasts)
    one_in = round(1 / (1 - report.confidence))
    points = [
        "<b>Paired.</b> Every model answered the same samples as the baseline, and a delta is model minus baseline. "
        "How hard a sample is cancels, so small changes can be told that two separate scores would hide.",
        f"<b>{level} interval.</b> The range of changes that the samples are in line with, from resampling them; with "
        "several seeds it also contains what varies between seeds.",
        *([CONTRASTS] if report.contrasts else []),
        "<b>No detectable change</b> means that the interval includes zero. It does not mean that nothing changed: "
        "the interval's ends tell how large a change these samples could have missed.",
        f"<b>Many intervals.</b> This page has {number} of retention and between methods. Where nothing has changed, "
        f"about 1 in {one_in} excludes zero all the same; a single one is weaker evidence than several that agree.",
        "<b>Right to wrong / wrong to right</b> counts the samples whose answer changed; McNemar's exact test asks "
        "whether one direction is more frequent than chance would have it. The samples themselves are in "
        "<code>flips.jsonl</code> beside this page.",
        "<b>↑ and ↓</b> say which direction is better, as in lm-eval.",
    ]
    return f"<ul>{''.join(f'<li>{point}</li>' for point in points)}</ul>"


def _findings_html(entries: Sequence[Finding]) -> str:
    items = (
        f"<li><b>{_label_html(entry.label)}</b><div>{''.join(map(_statement_html, entry.statements))}</div></li>"
        for entry in entries
    )
    return f'<ul class="findings">{"".join(items)}</ul>'


def _statement_html(statement: Statement) -> str:
    start = escape(statement.start)
    marked = f'<span class="{statement.verdict}">{start}</span>' if statement.verdict else start
    return f"<p>{marked} {escape(statement.text)}</p>"


def _figure_html(report: RetentionReport, name: str, image: bytes) -> str:
    caption, alternative = _descriptions(report)[name]
    lines = [caption, *(_frontier_lines(report) if name == "frontier.png" else [])]
    source = base64.b64encode(image).decode("ascii")
    return (
        f"<figure>\n<figcaption>{''.join(f'<p>{escape(line)}</p>' for line in lines)}</figcaption>\n"
        f'<div class="scroll"><img alt="{escape(alternative)}" src="data:image/png;base64,{source}"></div>\n</figure>'
    )


def _descriptions(report: RetentionReport) -> dict[str, tuple[str, str]]:
    """Caption and alternative text of each plot."""
    level = level_text(report.confidence)
    names = ", ".join(f"{outcome.task} {outcome.metric}" for outcome in main_outcomes(report))
    dots = " Small dots are single seeds." if any(result.seeds for result in report.models) else ""
    return {
        "deltas.png": (
            f"Change from the baseline, with its {level} interval. Where the bar crosses the line at zero, no change "
            f"can be told.{dots} {BEYOND_EDGE}",
            f"Forest plot: change of {names} from {report.baseline} in each model, with {level} intervals; "
            "the figures are in the tables below.",
        ),
        "frontier.png": (
            "Gain on the task trained on against what was kept: right and up is better. The grey line is the Pareto "
            "frontier: no model lies both further right and further up than those on it. It goes by the points alone; "
            f"look at the bars before reading much into a small step. {BEYOND_EDGE}",
            "Scatter plot: gain on the task trained on against what was kept, one point for each model; the figures "
            "are in the tables below.",
        ),
        "drift.png": (
            "How far training moved each part's weights, relative to their norm. Grey parts are unchanged.",
            "Heat map: relative drift of embeddings, layers and other weights, one row for each model.",
        ),
    }


def _frontier_lines(report: RetentionReport) -> list[str]:
    return [
        f"On the frontier of {outcome.task}, from the least gain: {'; '.join(frontier_labels(report, outcome))}."
        for outcome in retention_outcomes(report)
    ]


def _tables_html(report: RetentionReport) -> str:
    labels = {result.label for result in report.models}
    is_folded = len(labels) > MAX_OPEN_TABLES
    parts = ["<p>In colour: changes that can be told, green for better and red for worse.</p>"]
    for table in make_tables(report):
        title, content = _label_html(table.title), _table_html(table)
        if is_folded and table.title in labels:
            parts.append(f"<details><summary>{title}</summary>{content}</details>")
        else:
            parts.append(f"<h3>{title}</h3>{content}")
    return "\n".join(parts)


def _table_html(table: Table) -> str:
    kinds = [_column_class(header) for header in table.headers]
    head = "".join(map(_header_html, table.headers, kinds))
    rows = ("".join(map(_cell_html, row, kinds)) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _header_html(header: str, kind: str) -> str:
    """A header that breaks between names and between two alternatives, not within them."""
    first, separator, second = escape(header).partition(" / ")
    text = first.replace(" ↑", "&nbsp;↑").replace(" ↓", "&nbsp;↓")
    if separator:
        text = f"{first} /<br>{second}".replace(" ", "&nbsp;")
    return f'<th class="{kind}">{text}</th>'


def _column_class(header: str) -> str:
    if header in WRAPPED_COLUMNS:
        return "label"
    return "text" if header in TEXT_COLUMNS else "number"


def _cell_html(cell: Cell, kind: str) -> str:
    """A cell, coloured if its change can be told; an interval after a delta goes below it."""
    mark = f" {cell.verdict}" if cell.verdict in ("better", "worse") else ""
    delta, separator, interval = cell.text.partition(" [") if kind == "number" else (cell.text, "", "")
    below = f"<small>[{escape(interval)}</small>" if separator else ""
    return f'<td class="{kind}{mark}">{_label_html(delta)}{below}</td>'


def _label_html(text: str) -> str:
    """Text in which a number such as 2e-05 stays on one line."""
    return re.sub(r"\b\d[\d.]*e-\d+", r"<span>\g<0></span>", escape(text))
