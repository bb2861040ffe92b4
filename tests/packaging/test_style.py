"""Rules of the house that a tool can check."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = {
    *("pyproject.toml", "README.md", "LICENSE", "NOTICE", ".ci", ".gitignore", ".gitattributes"),
    *("qscope_jax", "kernels", "configs", "tests", "scripts"),
}
CODE = ("qscope_jax/", "kernels/", "scripts/")
# Written with a bracket, so that this line does not find itself.
MACHINE = re.compile(r"(?<![\w.])/(?:[w]ork|[r]oot|[f]arm|[t]mp|[h]ome)/|[.]library/")


def tracked() -> list[str]:
    """The repository's files; in an unpacked archive, every file that is not made by a build."""
    if shutil.which("git") and (ROOT / ".git").exists():
        told = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return [name for name in told.split("\0") if name and (ROOT / name).is_file()]
    made = re.compile(r"(^|/)(__pycache__|\.venv[^/]*|build|dist|[^/]*\.egg-info|\.\w+_cache|\.hypothesis)(/|$)")
    names = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file())
    return [name for name in names if not made.search(name)]


def text_of(name: str) -> str | None:
    content = (ROOT / name).read_bytes()
    return None if b"\0" in content[:8192] else content.decode("utf-8")


def test_the_top_level_holds_what_the_design_names():
    assert {name.split("/")[0] for name in tracked()} <= TOP


def test_files_stay_readable():
    lengths = {
        name: len((text_of(name) or "").splitlines())
        for name in tracked()
        if name.startswith(CODE) and name.endswith(".py")
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > 350} == {}


def test_every_module_says_what_it_is():
    silent = [
        name
        for name in tracked()
        if name.startswith(CODE) and name.endswith(".py") and not (text_of(name) or "").lstrip().startswith('"""')
    ]
    assert silent == []


def test_no_file_names_a_place_on_someones_machine():
    found = {name: hit.group() for name in tracked() if (hit := MACHINE.search(text_of(name) or ""))}
    assert found == {}


@pytest.mark.parametrize("text", ["open('/wo" + "rk/x')", " /ro" + "ot/a", "see /tm" + "p/x", "/hom" + "e/me/x"])
def test_the_search_for_places_finds_them(text):
    assert MACHINE.search(text)
    assert not MACHINE.search("https://example.org/work/x and tests/root/x and a/tmp/b")


@pytest.mark.parametrize("folder", ["kernels", "configs", "scripts", "tests"])
def test_project_folders_are_no_packages(folder):
    # `kernels` is the import name of another package, and transformers looks for it.
    assert not [name for name in tracked() if name.startswith(f"{folder}/") and name == f"{folder}/__init__.py"]


def test_scripts_can_be_started():
    for name in ("scripts/test", "scripts/demo", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111
        assert (text_of(name) or "").startswith("#!/usr/bin/env bash\n")
        subprocess.run(["bash", "-n", name], cwd=ROOT, check=True)
