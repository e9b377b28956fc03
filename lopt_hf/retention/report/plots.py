"""Plots of a retention report: what changed in each model, how far its layers moved, and what they now compute.

Axes reach up to Tukey's fences, so that a few diverged models do not squeeze all others.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lopt_hf.common.figures import OKABE_ITO, PANEL_PADDING, Axes, Figure, draw_heat_map, new_figure
from lopt_hf.retention.results import Delta, ModelResult, Outcome, RetentionReport, main_outcomes

__all__ = [
    "AxisRange",
    "GroupStyle",
    "fit_axis_range",
    "group_styles",
    "plot_deltas",
    "plot_drift",
    "plot_similarity",
    "plot_text",
]

COLORS = (
    "black",
    *(OKABE_ITO[name] for name in ("blue", "vermilion", "green", "purple", "orange", "sky blue")),
    *("#882255", "#999933", "#332288"),  # three dark hues of Paul Tol's palette "muted"
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # one fewer than colours, so that pairs do not repeat early
FILLS = ("full", "none", "left", "right", "top", "bottom")
PANELS_PER_ROW = 3
MAX_CHARACTERS = 44
INCHES_PER_CHARACTER = 0.075
MAX_WIDTH = 14  # inches
UNCHANGED = "#d9d9d9"
FENCE = 1.5  # Tukey, Exploratory Data Analysis (1977): values further from the quartiles, in their ranges, are outside
MARGIN = 0.05  # matplotlib's own, as a share of what is shown
HOLLOW: dict[str, Any] = {"markersize": 6, "markerfacecolor": "white", "markeredgewidth": 1.2, "zorder": 4}


@dataclass(frozen=True)
class AxisRange:
    """The lowest and the highest value that an axis shows."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Returns whether a value lies within the range."""
        return self.low <= value <= self.high

    def clamp(self, value: float) -> float:
        """Returns the nearest value within the range; for an infinite one that is an end of it."""
        return min(max(value, self.low), self.high)


def fit_axis_range(values: Sequence[tuple[float, float, float]]) -> AxisRange:
    """Fits a range around zero and all values within Tukey's fences, with their intervals.

    Args:
        values: Each value with the ends of its interval. Numbers that are not finite are left out.
    """
    numbers = [number for value in values for number in value if math.isfinite(number)]
    if not numbers:
        return AxisRange(-1.0, 1.0)
    first, third = np.quantile(numbers, (0.25, 0.75))
    reach = FENCE * float(third - first) or math.inf  # of equal values nothing is outside
    fences = AxisRange(float(first) - reach, float(third) + reach)
    inner = [value for value in values if fences.contains(value[0]) and math.isfinite(value[0])]
    ends = [fences.clamp(number) for value in inner for number in value if math.isfinite(number)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = MARGIN * (high - low) or 1.0
    return AxisRange(low - margin, high + margin)


@dataclass(frozen=True)
class GroupStyle:
    """How the models of one group are drawn; the members of a family differ by which half of a marker is filled."""

    color: str
    marker: str
    fill: str = "full"

    def marker_settings(self) -> dict[str, Any]:
        """Arguments of matplotlib for its markers."""
        edge = "white" if self.fill == "full" else self.color  # what is not filled needs an outline
        return {
            "color": self.color,
            "marker": self.marker,
            "fillstyle": self.fill,
            "markerfacecoloralt": "white",
            "markeredgecolor": edge,
        }


def group_styles(report: RetentionReport) -> dict[str, GroupStyle]:
    """Returns a colour and a marker for each group, the same in all plots of a report; one for each family if any."""
    groups = {result.group: result.family or result.group for result in report.models}
    families = list(dict.fromkeys(groups.values()))
    members = {name: [group for group, family in groups.items() if family == name] for name in families}
    styles = {}
    for group, family in groups.items():
        number, member = families.index(family), members[family].index(group)
        styles[group] = GroupStyle(
            COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)], FILLS[member % len(FILLS)]
        )
    return styles


def plot_text(text: str) -> str:
    """Shortens a name for a plot, to its end where it is long as paths are, and escapes dollar signs."""
    short = text if len(text) <= MAX_CHARACTERS else f"…{text[1 - MAX_CHARACTERS :]}"
    return short.replace("$", r"\$")


def plot_deltas(report: RetentionReport) -> Figure:
    """Plots every change with its interval: a panel for each outcome, gain and mean first, a row for each model.

    Args:
        report: What to draw. Single seeds are faint dots below the mean over them.

    Raises:
        ImportError: If matplotlib is missing.
    """
    outcomes = main_outcomes(report)
    columns = 2 if len(outcomes) == 4 else min(PANELS_PER_ROW, len(outcomes))
    rows = math.ceil(len(outcomes) / columns)
    width = 1 + _label_width(result.label for result in report.models) + 2.8 * columns
    figure = new_figure(width, 0.2 + rows * (1.0 + 0.25 * len(report.models)), PANEL_PADDING)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, outcome in zip(panels, outcomes, strict=False):
        _draw_deltas(axes, report, outcome)
    for axes in panels[len(outcomes) :]:
        axes.remove()
    return figure


def _draw_deltas(axes: Axes, report: RetentionReport, outcome: Outcome) -> None:
    styles = group_styles(report)
    found = {row: delta for row, result in enumerate(report.models) if (delta := outcome.of(result))}
    shown = fit_axis_range([(delta.delta, delta.low, delta.high) for delta in found.values()])
    axes.set_xlim(shown.low, shown.high)
    for row, delta in found.items():
        result = report.models[row]
        _draw_delta(axes, row, delta, shown, styles[result.group])
        of_seeds = [of_seed.delta for seed in result.seeds if (of_seed := outcome.of(seed))]
        color = styles[result.group].color
        axes.plot(of_seeds, [row + 0.28] * len(of_seeds), ".", color=color, alpha=0.4, markersize=4)
    axes.axvline(0, color="0.35", linewidth=0.9, zorder=0)
    axes.locator_params(axis="x", nbins=5)
    direction = {True: " (higher is better)", False: " (lower is better)", None: ""}[outcome.higher_is_better]
    axes.set_xlabel(f"change in {plot_text(outcome.metric)}{direction}")
    axes.set_title(plot_text(outcome.task) + " (task trained on)" * (outcome.kind == "gain"), fontsize="medium")
    axes.set_yticks(range(len(report.models)), [plot_text(result.label) for result in report.models])
    axes.set_ylim(len(report.models) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "left", "right"]].set_visible(False)
    _shade_groups(axes, report.models)


def _draw_delta(axes: Axes, row: int, delta: Delta, shown: AxisRange, style: GroupStyle) -> None:
    """One change with its interval; beyond the panel it stands at the edge, hollow, with its value."""
    axes.hlines(row, delta.low, delta.high, color=style.color, linewidth=1.6)
    for end, arrow in ((delta.low, "<"), (delta.high, ">")):
        if not (shown.contains(end) or math.isnan(end)) and shown.contains(delta.delta):
            axes.plot(shown.clamp(end), row, arrow, color=style.color, markersize=4, clip_on=False)
    if shown.contains(delta.delta) or math.isnan(delta.delta):
        axes.plot(delta.delta, row, style.marker, color=style.color, markersize=5)
        return
    is_low = delta.delta < shown.low
    inner_end = delta.high if is_low else delta.low
    interval = "" if math.isnan(inner_end) else f" [{delta.low:+.3g}, {delta.high:+.3g}]"
    axes.plot(shown.clamp(delta.delta), row, style.marker, color=style.color, clip_on=False, **HOLLOW)
    axes.annotate(
        f"{delta.delta:+.3g}{interval}",
        (shown.clamp(delta.delta if math.isnan(inner_end) else inner_end), row),
        xytext=(8 if is_low else -8, 0),
        textcoords="offset points",
        ha="left" if is_low else "right",
        va="center",
        fontsize=7,
        color="0.25",
        in_layout=False,
    )


def _shade_groups(axes: Axes, models: Sequence[ModelResult]) -> None:
    """Grey bands behind every second group of neighbouring rows."""
    for number, (_, rows) in enumerate(groupby(range(len(models)), key=lambda row: models[row].group)):
        for row in rows if number % 2 else ():
            axes.axhspan(row - 0.5, row + 0.5, color="0.95", linewidth=0, zorder=-1)


def plot_drift(report: RetentionReport) -> Figure | None:
    """Plots how far each part of each model moved: rows are models, columns embeddings, layers and the rest.

    Args:
        report: What to draw.

    Returns:
        `None` if no model's drift was measured.

    Raises:
        ImportError: If matplotlib is missing.
    """
    rows = {result.label: result.drift for result in report.models if result.drift}
    return _plot_layers(rows, "relative drift ||W - W0|| / ||W0||")


def plot_similarity(report: RetentionReport) -> Figure | None:
    """Plots how far what each layer computes is from the baseline's: 1 minus the linear CKA of hidden states.

    Args:
        report: What to draw.

    Returns:
        `None` if no model's similarity was measured.

    Raises:
        ImportError: If matplotlib is missing.
    """
    found = {result.label: result.similarity for result in report.models if result.similarity}
    rows = {label: {name: 1 - value for name, value in row.items()} for label, row in found.items()}
    return _plot_layers(rows, "1 - linear CKA with the baseline's hidden states")


def _plot_layers(rows: Mapping[str, Mapping[str, float]], what: str) -> Figure | None:
    """A heat map of values by label and part; `None` without rows."""
    if not rows:
        return None
    names = list(next(iter(rows.values())))  # the baseline's parts, which every model has
    width = 1 + _label_width(rows) + 0.23 * max(len(names), 24)
    figure = new_figure(min(width, MAX_WIDTH), 2.0 + 0.26 * len(rows), PANEL_PADDING)
    axes = figure.subplots()
    _draw_layers(axes, [[row[name] for name in names] for row in rows.values()], what)
    ticks = _layer_ticks(names)
    axes.set_xticks(list(ticks), [plot_text(text) for text in ticks.values()], rotation=90)
    axes.set_yticks(range(len(rows)), [plot_text(label) for label in rows])
    return figure


def _draw_layers(axes: Axes, values: Sequence[Sequence[float]], what: str) -> None:
    from matplotlib.patches import Patch

    moved = [value for row in values for value in row if value > 0 and math.isfinite(value)] or [1e-7, 1e-1]
    limits = 10.0 ** math.floor(math.log10(min(moved))), 10.0 ** math.ceil(math.log10(max(moved)) + 1e-9)
    image = draw_heat_map(axes, values, limits, UNCHANGED, gap=1)
    place: Any = {"location": "top", "shrink": 0.7, "anchor": (0, 0), "aspect": 40, "pad": 0.45 / len(values)}
    bar = axes.figure.colorbar(image, ax=axes, **place)
    bar.set_label(what, loc="left")  # where the bar is shorter, to the right
    if any(value == 0 for row in values for value in row):
        patch = Patch(color=UNCHANGED, label="unchanged")
        axes.legend(handles=[patch], loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0.1)


def _label_width(labels: Iterable[str]) -> float:
    """Inches that the longest label takes."""
    return INCHES_PER_CHARACTER * max(len(plot_text(label)) for label in labels)


def _layer_ticks(names: Sequence[str]) -> dict[int, str]:
    """Column -> what is written below it: layers by number, of many every fifth."""
    step = 1 if len(names) <= 20 else 5
    return {
        column: f"layer {name}" if name.isdigit() else name
        for column, name in enumerate(names)
        if not name.isdigit() or int(name) % step == 0
    }
