"""Draws `reach.png` and `mechanism.png`, what reach first and LoPT change: `make figures`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, TASK, LOCAL, EARLY, LATE, STILL = "#24292f", "#cf222e", "#1a7f37", "#dff3e4", "#fde3e1", "#f0f1f3"


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str, height: float = 0.9) -> None:
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", facecolor=color, edgecolor=INK
    )
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1.6) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0})


def end_to_end(axes: Axes) -> None:
    axes.set_title("End-to-end: one gradient through every layer", fontsize=11, color=INK)
    box(axes, 0.2, 1.5, 2.0, "embeddings", LATE)
    box(axes, 2.7, 1.5, 2.6, "layers 0 … 14", LATE)
    box(axes, 5.9, 1.5, 2.6, "layers 15 … 29", LATE)
    box(axes, 9.0, 1.5, 1.6, "LM head", LATE)
    for start, end in ((2.25, 2.65), (5.35, 5.85), (8.55, 8.95), (10.65, 11.2)):
        arrow(axes, (start, 1.95), (end, 1.95), INK)
    axes.text(11.3, 1.95, "task\nloss", va="center", fontsize=9.5, color=TASK)
    arrow(axes, (11.4, 1.1), (0.4, 1.1), TASK, 2.4)
    axes.text(5.9, 0.55, "backward starts when all activations are in memory", ha="center", fontsize=9, color=TASK)


def local_learning(axes: Axes) -> None:
    axes.set_title("LoPT: each block keeps its own gradient", fontsize=11, color=INK)
    box(axes, 0.2, 1.5, 2.0, "embeddings", EARLY)
    box(axes, 2.7, 1.5, 2.6, "layers 0 … 14", EARLY)
    box(axes, 6.5, 1.5, 2.2, "layers 15 … 29", LATE)
    box(axes, 9.2, 1.5, 1.4, "LM head", LATE)
    for start, end in ((2.25, 2.65), (5.35, 6.45), (8.75, 9.15), (10.65, 11.2)):
        arrow(axes, (start, 1.95), (end, 1.95), INK)
    axes.plot([5.9, 5.9], [0.95, 3.5], color=INK, lw=1.6, ls=(0, (4, 3)))
    axes.text(6.05, 3.3, "gradient boundary:\nthe output goes on detached", va="center", fontsize=9, color=INK)
    box(axes, 2.9, 2.95, 2.2, "reconstruction head", "white", 0.7)
    arrow(axes, (4.0, 2.45), (4.0, 2.93), LOCAL)
    axes.text(1.2, 3.3, "local loss:\nrecover the input", ha="center", va="center", fontsize=9, color=LOCAL)
    arrow(axes, (5.2, 1.1), (0.4, 1.1), LOCAL, 2.4)
    axes.text(2.8, 0.55, "1. backward at once: activations freed", ha="center", fontsize=9, color=LOCAL)
    axes.text(11.3, 1.95, "task\nloss", va="center", fontsize=9.5, color=TASK)
    arrow(axes, (11.4, 1.1), (6.5, 1.1), TASK, 2.4)
    axes.text(8.9, 0.55, "2. task backward, last block only", ha="center", fontsize=9, color=TASK)


def model(axes: Axes, early: str, late: str) -> None:
    """The decoder of the figure of reach, in two blocks."""
    box(axes, 0.2, 1.5, 2.0, "embeddings", early)
    box(axes, 2.7, 1.5, 2.6, "layers 0 … 14", early)
    box(axes, 6.5, 1.5, 2.2, "layers 15 … 29", late)
    box(axes, 9.2, 1.5, 1.4, "LM head", late)
    for start, end in ((2.25, 2.65), (5.35, 6.45), (8.75, 9.15), (10.65, 11.2)):
        arrow(axes, (start, 1.95), (end, 1.95), INK)
    axes.plot([5.9, 5.9], [0.95, 2.7], color=INK, lw=1.6, ls=(0, (4, 3)))
    axes.text(11.3, 1.95, "task\nloss", va="center", fontsize=9.5, color=TASK)
    arrow(axes, (11.4, 1.1), (6.5, 1.1), TASK, 2.4)


def first_part(axes: Axes) -> None:
    axes.set_title("Reach first, the first part of the run: both blocks learn the task", fontsize=11, color=INK)
    model(axes, LATE, LATE)
    arrow(axes, (5.3, 1.1), (0.4, 1.1), TASK, 2.4)
    axes.text(8.9, 0.55, "1. backward of the last block: activations freed", ha="center", fontsize=9, color=TASK)
    axes.text(2.8, 0.55, "2. the first block runs again, then its backward", ha="center", fontsize=9, color=TASK)


def later_part(axes: Axes) -> None:
    axes.set_title("Later: the last block learns, the first stands still", fontsize=11, color=INK)
    model(axes, STILL, LATE)
    axes.text(8.9, 0.55, "backward of the last block", ha="center", fontsize=9, color=TASK)
    axes.text(2.8, 0.55, "no gradients, no backward", ha="center", fontsize=9, color=INK)


def draw(name: str, panels: Sequence[Callable[[Axes], None]], tops: Sequence[float]) -> None:
    figure = Figure(figsize=(9, 0.77 * sum(tops)), layout="constrained")
    grid = figure.subplots(len(panels), 1, height_ratios=tops)
    for axes, panel, top in zip(grid, panels, tops, strict=True):
        axes.set(xlim=(0, 12.2), ylim=(0.3, top))
        axes.axis("off")
        panel(axes)
    figure.savefig(Path(__file__).with_name(name), dpi=150, facecolor="white")


def main() -> None:
    draw("reach.png", (end_to_end, first_part, later_part), (2.9, 2.9, 2.9))
    draw("mechanism.png", (end_to_end, local_learning), (2.9, 3.9))


if __name__ == "__main__":
    main()
