"""Bundles are counted by how often they run; and the encode's schedules stay as short as its README says."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "scripts" / "tpu_schedules.py"
# Of the bundles of a plain matmul with the same tiles; all that is between is spent on keeping the largest.
GOALS = {"v5e": 0.95, "v5p": 0.95, "v6e": 0.82, "tpu7x": 0.85}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tpu_schedules", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_regions_of_the_first_and_the_last_step_count_once(script, tmp_path):
    # 1000 bundles: a loop over 20..980, in it a region of 100 for the first step, one of 50 that every step may take,
    # and 600 bundles that fill one of two matrix slots.
    rows = [[1 if 300 <= i < 900 else 0, 4] for i in range(1000)]
    text = "== CAPACITY:\nMATMUL, VALU\n 2 4\n== UTILIZATION:\n" + "\n".join(" ".join(map(str, row)) for row in rows)
    (tmp_path / "1-kernel.1-64-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(text)
    branches = {30: 970, 100: 200, 210: 260, 980: 20}
    lines = [
        f" {i:#x} : > {{ %1 = sbr.rel (%p1) target bundleno = {branches[i]} ({branches[i]:#x}) }}"
        if i in branches
        else f" {i:#x} : > {{ }}"
        for i in range(1000)
    ]
    (tmp_path / "1-kernel.1-61-packed-bundles-post-ra.txt").write_text("\n".join(lines))
    (tmp_path / "1-kernel.1-60-schedule-analysis_packed-bundles-post-ra.txt").write_text("")
    assert script.read_schedule(tmp_path, "kernel") == (900, 100, 600 / (2 * 960))


@pytest.mark.all
@pytest.mark.aot
@pytest.mark.parametrize("chip", GOALS)
def test_the_encode_is_nearly_as_short_as_its_matmul(script, chip):
    pytest.importorskip("libtpu")
    plain, ours = (script.measure(chip, "d2048-f32768-k50", what, 8192) for what in ("plain", "fast"))
    assert plain["sweep"] / (ours["sweep"] + ours["finish"]) >= GOALS[chip]
