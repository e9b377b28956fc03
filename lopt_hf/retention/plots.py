"""The plots of a retention report: what changed in each model, and which layers moved.

Needs the optional extra `demo`, which brings matplotlib; it is imported on use.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lopt_hf.retention.measures import Measure, main_measures
from lopt_hf.retention.results import ModelResult, RetentionReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GroupStyle", "group_styles", "new_figure", "plot_deltas", "plot_drift", "plot_text", "widen_scale"]

# Okabe and Ito's palette without its yellow, which is faint on white, and three dark hues of Tol's "muted"
COLORS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # one fewer than colours, so that pairs do not repeat early
PANELS_PER_ROW = 3
MAX_CHARACTERS = 44
INCHES_PER_CHARACTER = 0.075
OUTLIER_RATIO = 15  # largest change by the median one, above which an axis turns logarithmic
MAX_WIDTH = 14  # inches
UNCHANGED = "#d9d9d9"


@dataclass(frozen=True)
class GroupStyle:
    """How the models of one group are drawn."""

    color: str
    marker: str


def group_styles(report: RetentionReport) -> dict[str, GroupStyle]:
    """A colour and a marker for each group, the same in all plots of a report."""
    groups = dict.fromkeys(result.group for result in report.models)
    return {
        group: GroupStyle(COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)])
        for number, group in enumerate(groups)
    }


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('The plots of a report need `matplotlib`: `pip install "lopt_hf[demo]"`.') from error
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.1))


def plot_text(text: str) -> str:
    """A name as it stands on a plot: of long ones, such as paths, the end; dollar signs are no formulas there."""
    short = text if len(text) <= MAX_CHARACTERS else f"…{text[1 - MAX_CHARACTERS :]}"
    return short.replace("$", r"\$")


def widen_scale(axes: "Axes", axis: Literal["x", "y"], values: Iterable[float]) -> str:
    """Bends an axis to a logarithmic one away from zero if a few values would squeeze all others.

    Args:
        axes: The panel.
        axis: Which of its axes.
        values: The changes drawn along it.

    Returns:
        What the axis label should say of it; empty if it was not needed.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    sizes = sorted(abs(value) for value in values if math.isfinite(value) and value)
    if not sizes or sizes[-1] < OUTLIER_RATIO * sizes[len(sizes) // 2]:
        return ""
    linear = float(f"{sizes[len(sizes) // 2]:.0e}")
    set_scale = axes.set_xscale if axis == "x" else axes.set_yscale
    set_scale("asinh", linear_width=linear)
    (axes.xaxis if axis == "x" else axes.yaxis).set(
        major_locator=FixedLocator(_wide_ticks(linear, sizes[-1])),
        major_formatter="{x:g}",
        minor_locator=NullLocator(),
    )
    axes.autoscale(axis=axis)
    return f"logarithmic beyond ±{linear:g}"


def _wide_ticks(linear: float, largest: float) -> list[float]:
    """Zero, the end of the linear part, and round values beyond it, on either side."""
    factors = (1, 2, 5) if largest < 50 * linear else (1,)
    decades = range(math.floor(math.log10(linear)), math.ceil(math.log10(largest)) + 1)
    rounds = [factor * 10.0**decade for decade in decades for factor in factors]
    positive = [linear, *(value for value in rounds if value >= 2 * linear)]
    return [*(-value for value in reversed(positive)), 0.0, *positive]


def plot_deltas(report: RetentionReport) -> "Figure":
    """Every change with its interval: one panel for each measure, gain and mean first, one row for each model.

    Args:
        report: What to draw. Single seeds are faint dots below the mean over them.

    Raises:
        ImportError: If matplotlib is missing.
    """
    measures = main_measures(report)
    columns = 2 if len(measures) == 4 else min(PANELS_PER_ROW, len(measures))
    rows = math.ceil(len(measures) / columns)
    width = 1 + _label_width(report.models) + 2.8 * columns
    figure = new_figure(width, height=0.2 + rows * (1.0 + 0.25 * len(report.models)))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, measure in zip(panels, measures, strict=False):
        _draw_deltas(axes, report, measure)
    for axes in panels[len(measures) :]:
        axes.remove()
    return figure


def _draw_deltas(axes: "Axes", report: RetentionReport, measure: Measure) -> None:
    styles = group_styles(report)
    drawn = []
    for row, result in enumerate(report.models):
        delta = measure.of(result)
        if delta is None:
            continue
        style = styles[result.group]
        axes.hlines(row, delta.low, delta.high, color=style.color, linewidth=1.6)
        axes.plot(delta.delta, row, style.marker, color=style.color, markersize=5)
        of_seeds = [found.delta for seed in result.seeds if (found := measure.of(seed))]
        axes.plot(of_seeds, [row + 0.28] * len(of_seeds), ".", color=style.color, alpha=0.4, markersize=4)
        drawn += [delta.delta, delta.low, delta.high, *of_seeds]
    axes.axvline(0, color="0.35", linewidth=0.9, zorder=0)
    axes.locator_params(axis="x", nbins=6)
    scale = "" if measure.higher_is_better else widen_scale(axes, "x", drawn)  # accuracies are bounded
    direction = "higher is better" if measure.higher_is_better else "lower is better"
    axes.set_xlabel(f"change in {plot_text(measure.metric)} ({direction})" + "\n" * bool(scale) + scale)
    axes.set_title(plot_text(measure.task) + " (task trained on)" * (measure.kind == "gain"), fontsize="medium")
    axes.set_yticks(range(len(report.models)), [plot_text(result.label) for result in report.models])
    axes.set_ylim(len(report.models) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "left", "right"]].set_visible(False)
    _shade_groups(axes, report.models)


def _shade_groups(axes: "Axes", models: Sequence[ModelResult]) -> None:
    """Grey bands behind every second group of neighbouring rows."""
    is_shaded = False
    for row, result in enumerate(models):
        if row and result.group != models[row - 1].group:
            is_shaded = not is_shaded
        if is_shaded:
            axes.axhspan(row - 0.5, row + 0.5, color="0.95", linewidth=0, zorder=-1)


def plot_drift(report: RetentionReport) -> "Figure | None":
    """How far each part of each model moved: rows are models, columns embeddings, layers and the rest.

    Args:
        report: What to draw.

    Returns:
        `None` if no model's drift was measured.

    Raises:
        ImportError: If matplotlib is missing.
    """
    models = [result for result in report.models if result.drift]
    if not models:
        return None
    names = _drift_columns(models)
    width = 1 + _label_width(models) + 0.23 * max(len(names), 24)
    figure = new_figure(min(width, MAX_WIDTH), height=2.0 + 0.26 * len(models))
    axes = figure.subplots()
    _draw_drift(axes, [[result.drift.get(name, math.nan) for name in names] for result in models])
    ticks = _drift_ticks(names)
    axes.set_xticks(list(ticks), [plot_text(text) for text in ticks.values()], rotation=90)
    axes.set_yticks(range(len(models)), [plot_text(result.label) for result in models])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _draw_drift(axes: "Axes", drift: Sequence[Sequence[float]]) -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    values = np.array(drift)
    moved = values[values > 0]
    low, high = (moved.min(), moved.max()) if moved.size else (1e-7, 1e-1)
    norm = LogNorm(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9))
    axes.imshow(np.where(values == 0, 0, np.nan), cmap=ListedColormap([UNCHANGED]), aspect="auto")
    image = axes.imshow(np.where(values > 0, values, np.nan), norm=norm, cmap="viridis", aspect="auto")
    rows, columns = values.shape
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, color="white", linewidth=1)
    place = {"location": "top", "shrink": 0.7, "anchor": (0, 0), "aspect": 40, "pad": 0.45 / rows}
    bar = axes.figure.colorbar(image, ax=axes, **place)
    bar.set_label("relative drift ||W - W0|| / ||W0||")
    if (values == 0).any():
        patch = Patch(color=UNCHANGED, label="unchanged")
        axes.legend(handles=[patch], loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0.1)


def _label_width(models: Sequence[ModelResult]) -> float:
    """Inches that the longest label takes."""
    return INCHES_PER_CHARACTER * max(len(plot_text(result.label)) for result in models)


def _drift_columns(models: Sequence[ModelResult]) -> list[str]:
    """Names in the order of the forward pass: embeddings, layers by number, the rest as given."""
    names = dict.fromkeys(name for result in models for name in result.drift)

    def place(name: str) -> tuple[int, int]:
        number = _layer_number(name)
        if number is not None:
            return 1, number
        return (0, 0) if name.startswith("embed") else (2, 0)

    return sorted(names, key=place)


def _drift_ticks(names: Sequence[str]) -> dict[int, str]:
    """Column -> what is written below it: layers by number, of many every fifth."""
    numbers = [_layer_number(name) for name in names]
    step = 1 if len(names) <= 20 else 5
    return {
        column: name if number is None else f"layer {number}"
        for column, (name, number) in enumerate(zip(names, numbers, strict=True))
        if number is None or number % step == 0
    }


def _layer_number(name: str) -> int | None:
    match = re.fullmatch(r"(?:layers?[ ._]*)?(\d+)", name)
    return int(match.group(1)) if match else None
