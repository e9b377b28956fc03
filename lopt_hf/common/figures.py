"""Figures of matplotlib, which comes with the optional extra `demo` and is imported on use."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_hf.common.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

__all__ = [
    "DPI",
    "OKABE_ITO",
    "PANEL_PADDING",
    "Axes",
    "Figure",
    "check_figure_path",
    "draw_heat_map",
    "new_figure",
    "save_figure",
]

DPI = 150
FORMATS = (".png", ".svg", ".pdf")
PANEL_PADDING = 0.1  # inches above and below each panel with a title and axes of its own
# Okabe and Ito's palette, which colour-blind readers can tell apart
OKABE_ITO = {
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
}


def new_figure(width: float, height: float, panel_padding: float | None = None) -> Figure:
    """Makes an empty figure whose panels are laid out without overlap.

    Args:
        width: In inches.
        height: In inches.
        panel_padding: Inches above and below each panel. Default: matplotlib's.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('Plots need `matplotlib`: `pip install "lopt_hf[demo]"`.') from error
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=panel_padding))


def check_figure_path(name: str, path: Path | None) -> None:
    """Checks before anything takes time that a figure can be written as the path's suffix says.

    Args:
        name: The option that gave the path.
        path: The file to write, if one is.

    Raises:
        ValueError: If it cannot.
    """
    if path is not None and path.suffix not in FORMATS:
        what = repr(path.suffix) if path.suffix else "no suffix"
        raise ValueError(f"{name}={path}: {what} is no format of a figure; use {', '.join(FORMATS)}.")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure atomically, in the format that the path's suffix names."""
    with atomic_file(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=DPI)


def draw_heat_map(
    axes: Axes, rows: Sequence[Sequence[float]], limits: tuple[float, float], zero_color: str, gap: float
) -> Any:
    """Draws values from 0 on with logarithmic colours, zeros in a colour of their own, nan not at all.

    Args:
        axes: Where to draw.
        rows: Values of each row, all of one length.
        limits: Values at both ends of the colours.
        zero_color: Colour of exact zeros.
        gap: Width of the white lines between rows, in points.

    Returns:
        The image, for a colour bar.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap, LogNorm

    values = np.array(rows)
    axes.imshow(np.where(values == 0, 0, np.nan), cmap=ListedColormap([zero_color]), aspect="auto")
    image = axes.imshow(np.where(values > 0, values, np.nan), norm=LogNorm(*limits), cmap="viridis", aspect="auto")
    axes.hlines(np.arange(len(values) - 1) + 0.5, -0.5, values.shape[1] - 0.5, color="white", linewidth=gap)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image
