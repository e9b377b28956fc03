"""Writes a retention report: as JSON, as the tables that lm-eval prints, as plots and as one page."""

from io import BytesIO
from pathlib import Path

from lopt_hf.common.figures import DPI
from lopt_hf.common.files import atomic_file, write_text
from lopt_hf.retention.report.frontier import plot_frontier
from lopt_hf.retention.report.page import render_page
from lopt_hf.retention.report.plots import plot_deltas, plot_drift
from lopt_hf.retention.report.tables import to_markdown
from lopt_hf.retention.results import RetentionReport

__all__ = ["check_report_folder", "to_html", "to_markdown", "write_report"]

PLOTS = {"deltas.png": plot_deltas, "frontier.png": plot_frontier, "drift.png": plot_drift}


def to_html(report: RetentionReport) -> str:
    """Renders a report as one page with findings, plots and tables, which loads nothing.

    Args:
        report: What to show.

    Raises:
        ImportError: If matplotlib is missing.
    """
    return render_page(report, _render_plots(report))


def check_report_folder(folder: Path) -> None:
    """Checks that a report may be written into a folder.

    Raises:
        ValueError: If it is a file, or holds other files and no earlier report.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "report.json").is_file():
        raise ValueError(f"output_dir={folder} is not empty and holds no earlier report; name another folder.")


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
    return [folder / name for name in ("report.json", "report.md", "report.html", *plots)]


def _render_plots(report: RetentionReport) -> dict[str, bytes]:
    """The plots as PNG files by name, without those that there is nothing to draw for."""
    images = {}
    for name, plot in PLOTS.items():
        figure = plot(report)
        if figure is not None:
            target = BytesIO()
            figure.savefig(target, dpi=DPI)
            images[name] = target.getvalue()
    return images
