"""The figure of an evaluation is drawn for any number of layers, and for numbers that are not there."""

import struct

import pytest
from matplotlib.figure import Figure

from qscope_jax.explorer.figures import draw_profile, draw_quality


def row(**changes):
    edges = [-2.0, -1.5, -1.0, -0.5, 0.0]
    histogram = {"edges": edges, "latents": [3, 5, 1, 1], "never": 2, "median": -1.4}
    usual = {"fvu": 0.1, "ce_recovered": 0.98, "dead_fraction": 0.2, "tokens": 1000.0, "sink_fraction": 0.01}
    return {**usual, "ce_clean": 3.1, "density": histogram, **changes}


def size(path):
    """Width and height of a PNG, from its header."""
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_more_layers_make_a_longer_picture_of_the_same_width(tmp_path):
    for layers in (1, 6, 7, 28):
        draw_quality(tmp_path / f"{layers}.png", {n: row() for n in range(layers)}, title="SAEs on a model", note="x")
    widths, heights = zip(*(size(tmp_path / f"{layers}.png") for layers in (1, 6, 7, 28)), strict=True)
    assert len(set(widths)) == 1
    assert heights[0] == heights[1] < heights[2] < heights[3]


@pytest.mark.parametrize(
    "changes",
    [
        {"fvu": None},
        {"ce_clean": None, "ce_recovered": None},
        {"dead_fraction": 1.0, "density": {"edges": [-1.0, 0.0], "latents": [0], "never": 11, "median": None}},
    ],
)
def test_numbers_that_are_not_defined_leave_gaps(tmp_path, changes):
    draw_quality(tmp_path / "x.png", {3: row(**changes), 9: row(**changes)}, title="x", note="y")
    assert size(tmp_path / "x.png")[0] > 1000


def test_an_auroc_below_one_half_stays_in_the_picture(tmp_path, monkeypatch):
    seen, save = [], Figure.savefig

    def saving(self, *given, **options):
        seen.extend(self.axes)
        save(self, *given, **options)

    monkeypatch.setattr(Figure, "savefig", saving)
    draw_profile(tmp_path / "x.png", [0, 1, 2], [0.1, -0.2, 0], [0.9, 0.2, 1], [1, 0, 0], title="x", note="y")
    for axes in seen:
        low, high = axes.get_ylim()
        values = axes.lines[0].get_ydata()
        assert low <= min(values)
        assert max(values) <= high
    assert seen[1].get_ylim()[0] < 0.2
    assert size(tmp_path / "x.png")[0] > 1000
