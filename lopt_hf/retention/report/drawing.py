"""A figure as a drawing within a page, whose points can be hovered over and focused."""

import re
from collections.abc import Mapping
from io import StringIO

from markupsafe import escape

from lopt_hf.common.figures import Figure

__all__ = ["draw_svg"]


def draw_svg(figure: Figure, texts: Mapping[str, str]) -> str:
    """Returns a figure as an SVG element of an HTML page, which loads nothing.

    Args:
        figure: The figure.
        texts: What is to be said of its artists, by their `gid`: each is reached by the tabulator key, and says so.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib import rc_context

    target = StringIO()
    with rc_context({"svg.hashsalt": "drawing"}):  # the same names of its parts each time
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them

    def named(match: re.Match[str]) -> str:
        text = escape(texts.get(match[1], ""))
        return f'<g id="{match[1]}" class="point" tabindex="0" role="img" aria-label="{text}"><title>{text}</title>'

    known = "|".join(map(re.escape, texts))
    return re.sub(rf'<g id="({known})">', named, svg) if texts else svg
