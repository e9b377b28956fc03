"""What every plot shares."""

import math

import pytest

pytest.importorskip("matplotlib")

from lopt_hf.common.figures import draw_heat_map, new_figure, save_figure  # noqa: E402


def test_zeros_have_a_colour_of_their_own_and_nan_has_none():
    axes = new_figure(4, 3).subplots()
    image = draw_heat_map(axes, [[0.0, 1e-3, math.nan], [1e-1, 0.0, 1e-2]], (1e-3, 1e-1), "red", gap=1)
    zeros, values = axes.images
    assert values is image
    assert zeros.get_array().mask.tolist() == [[False, True, True], [True, False, True]]
    assert values.get_array().mask.tolist() == [[True, False, True], [False, True, False]]
    assert zeros.to_rgba(0.0)[:3] == (1.0, 0.0, 0.0)
    assert (image.norm.vmin, image.norm.vmax) == (1e-3, 1e-1)


def test_the_suffix_names_the_format(tmp_path):
    for name, start in (("plot.png", b"\x89PNG"), ("plot.pdf", b"%PDF")):
        save_figure(new_figure(2, 1), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 2
