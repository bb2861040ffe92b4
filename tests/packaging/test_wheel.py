"""The wheel holds exactly the two packages, with the embedded files; built here without a network."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, since a build writes into its tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    for name in ("qscope_jax", "kernels", "scripts", "tests", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    subprocess.run(
        [sys.executable, "-P", "-c", BUILD, str(out)], cwd=tree, check=True, capture_output=True, timeout=300
    )
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_top_level_is_the_two_packages(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    info = {name for name in top if name.endswith(".dist-info")}
    assert top - info == {"qscope_jax", "qscope_kernels"}
    assert len(info) == 1


def test_every_file_of_the_packages_is_inside(wheel):
    inside = set(wheel.namelist())
    for base, package in ((ROOT, "qscope_jax"), (ROOT / "kernels", "qscope_kernels")):
        files = [f for f in (base / package).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
        wanted = {f.relative_to(base).as_posix() for f in files if not f.name.endswith(".tmp")}
        assert wanted
        assert wanted <= inside, f"not in the wheel: {sorted(wanted - inside)}"


def test_the_embedded_model_and_its_notice_are_inside(wheel):
    assets = [name for name in wheel.namelist() if name.startswith("qscope_jax/assets/")]
    assert "qscope_jax/assets/NOTICE.md" in assets
    for folder in ("model", "sae"):
        assert any(name.startswith(f"qscope_jax/assets/{folder}/") for name in assets)
    assert sum(wheel.getinfo(name).file_size for name in assets) < 10_000_000


def test_licence_and_notice_travel_along(wheel):
    names = {Path(name).name for name in wheel.namelist() if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE", "entry_points.txt"} <= names
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "qscope = qscope_jax.cli:main" in wheel.read(entry).decode()


def test_nothing_pulls_in_torch(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = wheel.read(metadata).decode().splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [line for line in needs if line.startswith("torch")] == ['torch==2.13.0; extra == "parity"']
    assert any(line.startswith("jax") and "extra" not in line for line in needs)
