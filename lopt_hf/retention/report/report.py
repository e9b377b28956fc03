"""Writes a retention report: as JSON, as the tables that lm-eval prints, as plots and as one page.

The page needs nothing beside it; its text and its style are in `page.html`.
"""

import base64
import json
import re
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lopt_hf.common.figures import DPI, new_figure
from lopt_hf.common.files import atomic_file, write_text
from lopt_hf.common.settings import check_folder
from lopt_hf.retention.comparisons import chance_line
from lopt_hf.retention.report.drawing import draw_svg
from lopt_hf.retention.report.findings import NO_BREAK_SPACE, findings
from lopt_hf.retention.report.frontier import frontier_labels, plot_frontier, point_texts, retention_outcomes
from lopt_hf.retention.report.plots import plot_deltas, plot_drift, plot_similarity
from lopt_hf.retention.report.tables import level_text, make_tables, to_markdown
from lopt_hf.retention.results import RetentionReport, main_outcomes

__all__ = ["check_plots", "check_report_folder", "render_page", "to_html", "to_markdown", "write_report"]

PLOTS = {
    "deltas.png": plot_deltas,
    "frontier.png": plot_frontier,
    "drift.png": plot_drift,
    "similarity.png": plot_similarity,
}
FLIPS = "flips.jsonl"  # what a command writes beside a report, and before it
CSS_PIXELS_PER_INCH = 96  # CSS Values and Units 3, Sec. 6.2
MAX_VALUES = 20  # of a list among the settings
MAX_OPEN_TABLES = 4  # more tables of single models are folded
TEXT_COLUMNS = ("", "Model", "Tasks", "Task", "Metric", "First", "Second", "Better", "Reading")
WRAPPED_COLUMNS = ("Model", "First", "Second", "Better")


def to_html(report: RetentionReport) -> str:
    """Renders a report as one page with findings, plots and tables, which loads nothing.

    Args:
        report: What to show.

    Raises:
        ImportError: If matplotlib is missing.
    """
    return render_page(report, _render_plots(report))


def check_plots() -> None:
    """Checks before anything takes time that a report's plots can be drawn.

    Raises:
        ImportError: If matplotlib is missing.
    """
    new_figure(1, 1)


def check_report_folder(folder: Path, command: str, may_hold_others: bool = False) -> bool:
    """Checks that a report may be written into a folder.

    Args:
        folder: The folder, which may not be there yet.
        command: The command that writes it, such as `lopt-hf retention`.
        may_hold_others: Whether the folder may hold files of other names than a report's.

    Returns:
        Whether it holds an earlier report of that command, which will be replaced.

    Raises:
        ValueError: If it is a file, or holds other files and no earlier report, or one of something else.
    """
    check_folder("output_dir", folder)
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "report.json" in found:
        _check_earlier(folder, command)
        return True
    if may_hold_others:
        found &= {"report.md", "report.html", FLIPS, *PLOTS}
    if found and not (found == {FLIPS} and _has_flips(folder / FLIPS)):  # the disk was full before the report
        what = f"has a {min(found)}" if may_hold_others else "is not empty"
        raise ValueError(f"output_dir={str(folder)!r} {what} and holds no earlier report; name another folder.")
    return False


def _check_earlier(folder: Path, command: str) -> None:
    """Raises unless the report in a folder is one that the command wrote."""
    place = f"output_dir={str(folder)!r} has a report.json"
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        written_by = str(report["settings"]["command"]) if {"baseline", "models"} <= report.keys() else ""
    except (OSError, ValueError, TypeError, AttributeError, KeyError):  # of something else, or no JSON
        written_by = ""
    if not written_by:
        raise ValueError(f"{place} that no command here wrote, which would be lost; name another folder.")
    if not f"{written_by} ".startswith(f"{command} "):
        raise ValueError(f"{place} of `{' '.join(written_by.split()[:2])}`, not of `{command}`; name another folder.")


def _has_flips(path: Path) -> bool:
    """Whether a file is one of changed answers, by its first row; none need have changed."""
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline()
        return not line or {"model", "task", "metric", "direction"} <= json.loads(line).keys()
    except (OSError, ValueError, AttributeError):
        return False


def write_report(report: RetentionReport, folder: Path) -> list[Path]:
    """Writes `report.json`, `report.md`, `report.html` and the plots that there is something to draw for.

    Values and tables come first, so that they are kept even if a plot cannot be drawn. Each file is complete, or as it
    was before.

    Args:
        report: What to write.
        folder: Where to; made if it is not there.

    Returns:
        The files written.

    Raises:
        ImportError: If matplotlib is missing; `report.json` and `report.md` are written all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "report.json") as path:
        report.save(path)
    write_text(folder / "report.md", to_markdown(report))
    plots = _render_plots(report)
    page = render_page(report, plots)
    for name in PLOTS:
        if name in plots:
            with atomic_file(folder / name) as path:
                path.write_bytes(plots[name])
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier report
    write_text(folder / "report.html", page)
    return [
        folder / name
        for name in ("report.json", "report.md", "report.html", *PLOTS)
        if name not in PLOTS or name in plots
    ]


def _render_plots(report: RetentionReport) -> dict[str, bytes]:
    """The plots as PNG files by name, without those that there is nothing to draw for."""
    images = {}
    for name, plot in PLOTS.items():
        figure = plot(report)
        if figure is not None:
            target = BytesIO()
            figure.savefig(target, dpi=DPI)
            images[name] = target.getvalue()
            if name == "frontier.png":
                images["frontier.svg"] = draw_svg(figure, point_texts(report)).encode()
    return images


def render_page(report: RetentionReport, plots: Mapping[str, bytes]) -> str:
    """Renders the page, with style and plots inside it.

    Args:
        report: What to show.
        plots: PNG files by name, out of `deltas.png`, `frontier.png`, `drift.png` and `similarity.png`; in the place
            of the frontier's, if it is there, its drawing `frontier.svg`, whose points tell of their models.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    templates.filters.update(label=_label_html, column=_column_class)
    labels = {result.label for result in report.models}
    return templates.get_template("page.html").render(
        report=report,
        level=level_text(report.confidence),
        most_seeds=max((len(result.seeds) for result in report.models), default=0),
        samples={delta.task: delta.n for result in report.models for delta in result.deltas},
        gain=next((result.gain for result in report.models if result.gain), None),
        one_in=round(1 / (1 - report.confidence)),
        num_intervals=sum(len(r.deltas) + bool(r.mean) for r in report.models) + len(report.contrasts),
        chance=chance_line(report),
        findings=findings(report),
        outcomes=", ".join(f"{outcome.task} {outcome.metric}" for outcome in main_outcomes(report)),
        frontiers=[(outcome.task, frontier_labels(report, outcome)) for outcome in retention_outcomes(report)],
        widths={name: _width_on_page(image) for name, image in plots.items() if name in PLOTS},
        plots={name: base64.b64encode(image).decode("ascii") for name, image in plots.items() if name in PLOTS},
        drawing=Markup(plots["frontier.svg"].decode()) if "frontier.svg" in plots else None,
        tables=make_tables(report),
        labels=labels,
        is_folded=len(labels) > MAX_OPEN_TABLES,
        max_values=MAX_VALUES,
        nbsp=NO_BREAK_SPACE,
    )


def _width_on_page(image: bytes) -> int:
    """CSS pixels that a PNG file takes at the size that it was drawn for, with its type at that of the page."""
    (pixels,) = struct.unpack(">I", image[16:20])  # PNG, 3rd edition, Sec. 11.2.1: the header's first field
    return round(pixels / DPI * CSS_PIXELS_PER_INCH)


def _column_class(header: str) -> str:
    if header in WRAPPED_COLUMNS:
        return "label"
    return "text" if header in TEXT_COLUMNS else "number"


def _label_html(text: str) -> Markup:
    """Text in which a number such as 2e-05 stays on one line."""
    return Markup(re.sub(r"\b\d[\d.]*e-\d+", r"<span>\g<0></span>", str(escape(text))))
