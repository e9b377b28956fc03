"""Gain against retention: which models learn more without forgetting more."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np

from lopt_hf.common.figures import PANEL_PADDING, Axes, Figure, new_figure
from lopt_hf.retention.report.plots import HOLLOW, AxisRange, GroupStyle, fit_axis_range, group_styles, plot_text
from lopt_hf.retention.results import ModelResult, Outcome, RetentionReport, main_outcomes

if TYPE_CHECKING:
    from matplotlib.transforms import Bbox

__all__ = [
    "frontier_labels",
    "pareto_frontier",
    "plot_frontier",
    "point_id",
    "point_texts",
    "retention_outcomes",
]

BASELINE = "baseline"
BEYOND_EDGE = "beyond the edge: (gain, kept)"
LEGEND_COLUMNS = 4
# Where a note may stand beside its point, best first: direction, times distance in points
NOTE_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1.4), (0, -1.4), (1.4, 0), (-1.4, 0))
NOTE_DISTANCES = (4, 8, 13, 20)
POINT: dict[str, Any] = {"markersize": 7.5, "markeredgewidth": 0.8}


@dataclass(frozen=True)
class _Point:
    """One model in a panel; more is better along both axes."""

    result: ModelResult
    x: float
    y: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    seeds: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class _Panel:
    """What was kept of one outcome against the gain: the points, and the ranges of the axes."""

    outcome: Outcome
    points: list[_Point]
    x: AxisRange
    y: AxisRange

    @classmethod
    def of(cls, report: RetentionReport, outcome: Outcome) -> "_Panel":
        points = _points(report, outcome)
        x_range = fit_axis_range([(point.x, *point.x_ends) for point in points])
        return cls(outcome, points, x_range, fit_axis_range([(point.y, *point.y_ends) for point in points]))

    def contains(self, point: _Point) -> bool:
        return self.x.contains(point.x) and self.y.contains(point.y)

    def place(self, point: _Point) -> tuple[float, float]:
        """Returns where a point is drawn: at its values, or at the panel's edge."""
        return self.x.clamp(point.x), self.y.clamp(point.y)


def retention_outcomes(report: RetentionReport) -> list[Outcome]:
    """Returns what gain is drawn against: the mean over tasks, and each task whose main metric is better when lower.

    Empty if the report has no gain.
    """
    outcomes = main_outcomes(report)
    if not outcomes or outcomes[0].kind != "gain":
        return []
    kept = [outcome for outcome in outcomes[1:] if outcome.kind == "mean" or outcome.higher_is_better is False]
    return [outcome for outcome in kept if _points(report, outcome)]


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other point beats in both coordinates, more being better, from left to right."""
    best = -math.inf
    frontier = []
    for x, y in sorted(set(points), reverse=True):
        if y > best:
            frontier.append((x, y))
            best = y
    return frontier[::-1]


def frontier_labels(report: RetentionReport, outcome: Outcome) -> list[str]:
    """Returns the labels on the Pareto frontier of gain and one outcome, possibly with the baseline's.

    Args:
        report: What was measured.
        outcome: One of `retention_outcomes`.
    """
    points = _points(report, outcome)
    frontier = _frontier(points)
    named = [(0.0, 0.0, BASELINE), *((point.x, point.y, point.result.label) for point in points)]
    return [name for x, y, name in sorted(named) if (x, y) in frontier]


def plot_frontier(report: RetentionReport) -> Figure | None:
    """Plots the gain on the task trained on against retention: a panel for each outcome, a point for each model.

    Along both axes more is better, and the baseline is the origin. The Pareto frontier is that of the points; it knows
    nothing of their intervals. A model far from all others is drawn at the edge, hollow, with its values beside it.

    Args:
        report: What to draw. Single seeds are faint.

    Returns:
        `None` if the report has no gain, or nothing to draw it against.

    Raises:
        ImportError: If matplotlib is missing.
    """
    outcomes = retention_outcomes(report)
    if not outcomes:
        return None
    styles = group_styles(report)
    height = 4.8 * len(outcomes) + 0.2 * math.ceil(len(styles) / LEGEND_COLUMNS)
    figure = new_figure(10, height, PANEL_PADDING)
    panels = [_Panel.of(report, outcome) for outcome in outcomes]
    drawn = list(zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True))
    for axes, panel in drawn:
        _draw_panel(axes, panel, styles)
    is_cut = any(not panel.contains(point) for panel in panels for point in panel.points)
    _draw_legend(figure, styles, any(result.seeds for result in report.models), is_cut)
    figure.draw_without_rendering()  # settles where the points are, and with them where a note has room
    for axes, panel in drawn:
        _write_notes(axes, panel, styles)
    return figure


def point_id(outcome: Outcome, result: ModelResult) -> str:
    """Returns the name of a model's point in the drawing of an outcome, where the page finds it."""
    text = f"{outcome.task} {outcome.metric} {result.label}"
    return f"point-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def point_texts(report: RetentionReport) -> dict[str, str]:
    """Returns what there is to say of each point of the frontier, by its name: values, intervals and the command."""
    texts = {}
    for outcome in retention_outcomes(report):
        for point in _points(report, outcome):
            gained = f"gain {point.x:+.4f} [{min(point.x_ends):+.4f}, {max(point.x_ends):+.4f}]"
            kept = f"{outcome.task} {point.y:+.4f} [{min(point.y_ends):+.4f}, {max(point.y_ends):+.4f}]"
            command = f": {point.result.command}" if point.result.command else ""
            texts[point_id(outcome, point.result)] = f"{point.result.label}; {gained}, {kept}{command}"
    return texts


def _points(report: RetentionReport, outcome: Outcome) -> list[_Point]:
    gain_outcome = main_outcomes(report)[0]
    points = []
    for result in report.models:
        gained, kept = _oriented(result, gain_outcome), _oriented(result, outcome)
        if gained and kept:
            of_seeds = [(_oriented(seed, gain_outcome), _oriented(seed, outcome)) for seed in result.seeds]
            seeds = tuple((x[0], y[0]) for x, y in of_seeds if x and y)
            points.append(_Point(result, gained[0], kept[0], gained[1:], kept[1:], seeds))
    return points


def _oriented(result: ModelResult, outcome: Outcome) -> tuple[float, float, float] | None:
    """Delta and the ends of its interval, with more as better; `None` without a delta that can be drawn."""
    delta = outcome.of(result)
    if delta is None or math.isnan(delta.delta):
        return None
    return outcome.sign * delta.delta, outcome.sign * delta.low, outcome.sign * delta.high


def _frontier(points: Sequence[_Point]) -> list[tuple[float, float]]:
    return pareto_frontier([(0.0, 0.0), *((point.x, point.y) for point in points)])


def _draw_panel(axes: Axes, panel: _Panel, styles: dict[str, GroupStyle]) -> None:
    outcome = panel.outcome
    axes.set(xlim=(panel.x.low, panel.x.high), ylim=(panel.y.low, panel.y.high))
    for group, style in styles.items():
        of_group = sorted((point for point in panel.points if point.result.group == group), key=lambda point: point.x)
        _draw_group(axes, of_group, panel, style)
    axes.plot(0, 0, "*", color="0.25", markersize=13, zorder=3)
    _draw_frontier(axes, _frontier(panel.points))
    axes.set_title(f"Gain against {plot_text(outcome.task)}", fontsize="medium")
    kept = f"change in {outcome.metric}" if outcome.higher_is_better else f"{outcome.metric}, baseline minus model"
    axes.set_xlabel("gain: held-out loss, baseline minus model\n(nats per token; right is better)")
    axes.set_ylabel(plot_text(kept) + "\n(up is better)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_group(axes: Axes, points: Sequence[_Point], panel: _Panel, style: GroupStyle) -> None:
    for one, other in zip(points, points[1:], strict=False):
        dots = "-" if panel.contains(one) and panel.contains(other) else ":"
        axes.plot(*zip(panel.place(one), panel.place(other), strict=True), dots, color=style.color, linewidth=1)
    for point in points:
        if not panel.contains(point):
            (drawn,) = axes.plot(*panel.place(point), style.marker, color=style.color, clip_on=False, **HOLLOW)
            drawn.set_gid(point_id(panel.outcome, point.result))
            continue
        axes.hlines(point.y, *point.x_ends, color=style.color, linewidth=0.8, alpha=0.5)
        axes.vlines(point.x, *point.y_ends, color=style.color, linewidth=0.8, alpha=0.5)
        (drawn,) = axes.plot(point.x, point.y, zorder=4, **POINT, **style.marker_settings())
        drawn.set_gid(point_id(panel.outcome, point.result))
        for x, y in point.seeds:
            axes.plot(x, y, style.marker, color=style.color, markersize=3, alpha=0.35, markeredgewidth=0)


def _draw_frontier(axes: Axes, frontier: Sequence[tuple[float, float]]) -> None:
    """A step line under which every point is beaten by another, to the panel's edges."""
    left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
    x = [left, *(point[0] for point in frontier), frontier[-1][0]]
    y = [frontier[0][1], *(point[1] for point in frontier), bottom]
    axes.plot(x, y, color="0.7", linewidth=4, alpha=0.6, drawstyle="steps-pre", zorder=0, solid_capstyle="butt")


def _draw_legend(figure: Figure, styles: dict[str, GroupStyle], with_seeds: bool, is_cut: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **POINT, **style.marker_settings(), label=plot_text(group)) for group, style in styles.items()
    ]
    handles.append(Line2D([], [], color="0.25", marker="*", markersize=11, linestyle="none", label=BASELINE))
    handles.append(Line2D([], [], color="0.7", linewidth=4, alpha=0.6, label="Pareto frontier"))
    if with_seeds:
        handles.append(Line2D([], [], color="0.6", marker="o", markersize=3, linestyle="none", label="single seeds"))
    if is_cut:
        handles.append(Line2D([], [], color="0.4", marker="o", linestyle=":", **HOLLOW, label=BEYOND_EDGE))
    figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize="small")


def _notes(results: Sequence[ModelResult]) -> list[str]:
    """What tells the labels of a group apart: the words that they do not all begin or end with."""
    words = [result.label.split() for result in results]
    if len(words) < 2:
        return [""] * len(words)
    start = len(commonprefix(words))
    end = len(commonprefix([label[start:][::-1] for label in words]))
    return [" ".join(label[start : len(label) - end]).strip("(),;") for label in words]


def _write_notes(axes: Axes, panel: _Panel, styles: dict[str, GroupStyle]) -> None:
    """Tells the points of a group apart, each note where it covers least."""
    from matplotlib.transforms import Bbox

    where = axes.transData.transform([panel.place(point) for point in panel.points])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in (*where, axes.transData.transform((0, 0)))]
    for group, style in styles.items():
        of_group = [point for point in panel.points if point.result.group == group]
        for point, note in zip(of_group, _notes([point.result for point in of_group]), strict=True):
            if not panel.contains(point):
                note = f"{note} ({point.x:.3g}, {point.y:.3g})".strip()
            if note:
                taken.append(_write_note(axes, panel.place(point), plot_text(note), style, taken))


def _write_note(axes: Axes, at: tuple[float, float], note: str, style: GroupStyle, taken: Sequence["Bbox"]) -> "Bbox":
    """Writes one note at the first place that covers the fewest of `taken`, and returns the place."""
    from matplotlib.patheffects import withStroke

    text = axes.annotate(note, at, xytext=(0, 0), textcoords="offset points", color=style.color)
    text.set(fontsize=7, in_layout=False, path_effects=[withStroke(linewidth=3, foreground="white")], zorder=5)

    def place(distance: float, direction: tuple[float, float]) -> "Bbox":
        right, up = direction
        text.xyann = (right * distance, up * distance)
        text.set(ha=("center", "left", "right")[int(np.sign(right))], va=("center", "bottom", "top")[int(np.sign(up))])
        return text.get_window_extent()

    def covered(candidate: tuple[float, tuple[float, float]]) -> int:
        box = place(*candidate)
        is_inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
        return sum(map(box.overlaps, taken)) + len(taken) * (not is_inside)

    candidates = list(product(NOTE_DISTANCES, NOTE_DIRECTIONS))
    free = next((candidate for candidate in candidates if not covered(candidate)), None)
    return place(*(free or min(candidates, key=covered)))
