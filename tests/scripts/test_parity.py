"""./scripts/parity, on the embedded files, as a person runs it on real ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "parity.py"


def compare(*arguments: str) -> list[list[str]]:
    """Rows of the table: layer, relative L2, indices of torch, of the fast mode, FVU, cosine, FVU without sinks."""
    path = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "demo", "demo", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return [line.split() for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0].isdecimal()][1:]


@pytest.mark.parity
def test_every_layer_agrees_with_the_releases_formula_in_torch():
    pytest.importorskip("torch")
    rows = compare("--layers", "0", "5", "--max-tokens", "64")
    assert [row[0] for row in rows] == ["0", "5"]
    for _, l2, indices, fast, fvu, _, without_sinks in rows:
        assert float(l2) < 1e-5
        assert indices == "100.0000%"
        assert 95 < float(fast.rstrip("%")) <= 100
        assert float(without_sinks) == float(fvu) < 0.3  # the embedded model has no sinks
