"""Heat in a terminal: as many cells as tokens, colours for people only."""

import re

from qscope_jax.explorer.terminal import heat, spans, tinted


def test_a_cell_per_value_rises_with_it():
    assert heat([0, 0.1, 5, 9], 9, colour=False) == ".159"
    coloured = heat([0, 0.1, 5, 9], 9, colour=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == "·▁▄█"
    assert heat([0.0, 0.0], 0.0, colour=False) == ".."


def test_text_is_tinted_or_marked_and_otherwise_unchanged():
    labels, values = ["a", " b", "c"], [0.0, 4.0, 1.0]
    assert tinted(labels, values, colour=False) == "a[ b]c"
    assert re.sub(r"\x1b\[[\d;]*m", "", tinted(labels, values, colour=True)) == "a bc"
    assert tinted([], [], colour=False) == ""


def test_long_lines_are_cut_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert [(s.start, s.stop) for s in spans(70, 20)] == [(0, 30), (30, 60), (60, 70)]
