"""The scripts on a fresh machine: which interpreter, which environment, what pip is told, what is said offline."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "dirname", "env", "grep", "head", "ln", "mkdir", "timeout", "touch")

# An interpreter that only writes down what it is asked, and answers as told by files beside it.
FAKE = """#!/usr/bin/env bash
here="{home}"
printf '%s\\n' "$*" >> "$here/asked"
case "$*" in
  *version_info*) exit 0 ;;
  *"environment.py missing"*) [ -e "$here/complete" ] ;;
  *"environment.py reach"*) [ -e "$here/online" ] || {{ echo "no index answers" >&2; exit 1; }} ;;
  *"m.version(\\"torch\\")"*) [ -e "$here/torch" ] ;;
  *"pip install"*)
    env | grep '^PIP_' >> "$here/pip"
    case "$*" in *torch*) touch "$here/torch" ;; *) touch "$here/complete" ;; esac ;;
  *"-m $(cat "$here/fails" 2>/dev/null || echo nothing)"*) exit 3 ;;
  *) exit 0 ;;
esac
"""


class Machine:
    """A copy of what the scripts need, a PATH with nothing but tools, and optionally an interpreter on it."""

    def __init__(self, folder: Path):
        self.tree, self.bin, self.home = folder / "a tree", folder / "bin", folder
        for path in (self.tree / "scripts", self.tree / ".ci", self.tree / "kernels", self.bin):
            path.mkdir(parents=True)
        for name in ("scripts/bootstrap.sh", "scripts/environment.py", "scripts/test", "scripts/demo", ".ci/run"):
            shutil.copy(ROOT / name, self.tree / name)
        shutil.copy(ROOT / "pyproject.toml", self.tree)
        for name in ("qscope_jax", "kernels/qscope_kernels"):
            (self.tree / name).symlink_to(ROOT / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool}"))

    def script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def fake(self, path: Path) -> Path:
        return self.script(path, FAKE.format(home=self.home))

    def asked(self) -> list[str]:
        path = self.home / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "QSCOPE_", "VIRTUAL", "CONDA", "PYTHON"))
        }
        return subprocess.run(
            command, cwd=self.tree, env={**kept, "PATH": str(self.bin), **environment}, capture_output=True, text=True,
            timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_without_an_interpreter_the_answer_says_what_is_needed(machine):
    machine.script(machine.bin / "python3", '#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.9.1; exit 1\n')
    done = machine.run("scripts/demo")
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "python3 is Python 3.9.1" in done.stderr
    assert "PYTHON=" in done.stderr


def test_an_interpreter_without_venv_is_named(machine):
    text = '#!/usr/bin/env bash\ncase "$*" in *ensurepip*|*environment.py*) exit 1 ;; esac\nexit 0\n'
    machine.script(machine.bin / "python3.12", text)
    done = machine.run("scripts/test")
    assert done.returncode == 1
    assert "python3.12 has no module venv or ensurepip" in done.stderr
    assert "python3-venv" in done.stderr


def test_a_complete_environment_on_the_path_is_used_and_left_alone(machine):
    machine.script(machine.bin / "python3", f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    show = (
        "import importlib.util as u, qscope_jax, qscope_kernels, qscope_jax.files.atomic; "
        "print(qscope_jax.__file__, qscope_kernels.__file__, u.find_spec('configs'))"
    )
    command = f'. scripts/bootstrap.sh; prepare test; "$QS_PYTHON" -P -c "{show}"'
    done = machine.run("bash", "-euc", command, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == 0, done.stderr
    package, kernels, configs = done.stdout.split("/__init__.py")
    assert (ROOT / "qscope_jax").samefile(package)
    assert (ROOT / "kernels" / "qscope_kernels").samefile(kernels.strip())
    assert configs.strip() == "None"
    assert not (machine.tree / ".venv").exists()


def test_an_own_environment_that_is_complete_is_used_without_pip(machine):
    machine.fake(machine.tree / ".venv/bin/python")
    (machine.home / "complete").touch()
    begin = time.monotonic()
    assert machine.run("scripts/demo", "--out", "x").returncode == 0
    assert time.monotonic() - begin < 10
    assert machine.asked()[-1] == "-P -m qscope_jax.cli demo --out x"
    assert not [line for line in machine.asked() if "pip" in line or "reach" in line]


def test_pip_gets_the_callers_own_settings_and_the_extras(machine):
    venv = machine.home / "mine"
    machine.fake(venv / "bin/python")
    (machine.home / "online").touch()
    done = machine.run(
        "scripts/test", QSCOPE_VENV=str(venv), PIP_NO_INDEX="1", PIP_FIND_LINKS="/wheels", QSCOPE_PARITY="1"
    )
    assert done.returncode == 0, done.stderr
    (install,) = [line for line in machine.asked() if "pip install" in line]
    assert install.endswith(f"--editable {machine.tree}[test,parity]")
    assert set((machine.home / "pip").read_text().splitlines()) == {"PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels"}


def test_the_demo_needs_no_extras(machine):
    machine.fake(machine.tree / ".venv/bin/python")
    (machine.home / "online").touch()
    assert machine.run("scripts/demo").returncode == 0
    (install,) = [line for line in machine.asked() if "pip install" in line]
    assert install.endswith(f"--editable {machine.tree}")


@pytest.mark.parametrize(
    ("arguments", "pytest_sees"),
    [
        ((), "-m not all"),
        (("--quick",), "-m not all and not slow"),
        (("--all",), ""),
        (("--quick", "tests/sae", "-x"), "-m not all and not slow tests/sae -x"),
        (("-k", "some name"), "-m not all -k some name"),
    ],
)
def test_what_the_test_script_runs(machine, arguments, pytest_sees):
    machine.fake(machine.tree / ".venv/bin/python")
    (machine.home / "complete").touch()
    assert machine.run("scripts/test", *arguments).returncode == 0
    ran = [line for line in machine.asked() if line.startswith("-P -m ")]
    assert ran[:2] == ["-P -m ruff check .", "-P -m ruff format --check ."]
    assert ran[2].startswith("-P -m pyright --pythonpath ")
    assert ran[3:] == [f"-P -m pytest {pytest_sees}".rstrip()]


@pytest.mark.parametrize("tool", ["ruff check", "ruff format", "pyright", "pytest"])
def test_a_failure_of_any_tool_fails_the_whole(machine, tool):
    machine.fake(machine.tree / ".venv/bin/python")
    (machine.home / "complete").touch()
    (machine.home / "fails").write_text(tool)
    done = machine.run("scripts/test")
    assert done.returncode == (3 if tool == "pytest" else 1)
    assert (f"failed before the tests: {tool}" in done.stderr) is (tool != "pytest")
    assert machine.asked()[-1].startswith("-P -m pytest")


@pytest.mark.parametrize("has_torch", [False, True])
def test_continuous_integration_installs_the_oracle_and_calls_the_test_script(machine, has_torch):
    machine.fake(machine.tree / ".venv/bin/python")
    (machine.home / "online").touch()
    if has_torch:
        (machine.home / "torch").touch()
    done = machine.run(".ci/run")
    assert done.returncode == 0, done.stderr
    torch = [line for line in machine.asked() if "torch==2.13.0" in line]
    assert len(torch) == (0 if has_torch else 1)
    assert machine.asked()[-1] == "-P -m pytest -m not all"


# --- what an interpreter is asked ---


def lacks(folder: Path, dependencies: list[str], extras: dict[str, list[str]], *chosen: str) -> list[str]:
    lines = [f"dependencies = {dependencies!r}", "[project.optional-dependencies]"]
    text = "\n".join(["[project]", *lines, *(f"{name} = {value!r}" for name, value in extras.items())])
    (folder / "pyproject.toml").write_text(text)
    command = [sys.executable, "-P", str(ROOT / "scripts/environment.py"), "missing", str(folder / "pyproject.toml")]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=60)
    assert done.returncode == (1 if done.stdout.strip() else 0), done.stderr
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def test_what_is_missing_is_listed_with_what_is_there(tmp_path):
    extras = {"some": ["no-such-package-at-all"], "other": ["nor-this-one"]}
    assert lacks(tmp_path, ["numpy>=1.0", "jax"], extras) == []
    assert lacks(tmp_path, ["numpy>=1.0", "jax"], extras, "some") == ["no-such-package-at-all"]
    (old,) = lacks(tmp_path, ["numpy>=999"], extras)
    assert old.startswith("numpy>=999 (has ")
    assert lacks(tmp_path, ["no-such-package-at-all; python_version < '3'"], {}) == []


def test_what_a_requirement_needs_in_turn_is_missed_too(tmp_path, monkeypatch):
    info = tmp_path / "site" / "broken_thing-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: broken-thing\nVersion: 1.0\nRequires-Dist: gone-one\n"
        "Requires-Dist: gone-two; extra == 'more'\nRequires-Dist: broken-thing[more]; extra == 'all'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert lacks(tmp_path, ["broken-thing"], {}) == ["gone-one"]
    assert lacks(tmp_path, ["broken-thing[all]"], {}) == ["gone-one", "gone-two"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"PIP_NO_INDEX": "1"}, {"PIP_INDEX_URL": "https://10.255.255.1/simple"}])
def test_offline_with_nothing_the_answer_comes_soon_and_says_what_to_run(machine, tmp_path, settings):
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    probe = [str(base), "-S", "-c", "import ensurepip, venv"]
    if not base.exists() or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("the base interpreter cannot make environments")
    # -S: as bare as on a fresh machine, whatever has been installed beside this interpreter.
    machine.script(machine.bin / "python3", f'#!/usr/bin/env bash\nexec "{base}" -S "$@"\n')
    (tmp_path / "empty").mkdir()
    settings = {**settings, "PIP_FIND_LINKS": str(tmp_path / "empty"), "PIP_CONFIG_FILE": os.devnull}
    begin = time.monotonic()
    done = machine.run("scripts/test", **settings)
    assert time.monotonic() - begin < 20
    assert done.returncode == 1
    assert "Online, run again:    ./scripts/test" in done.stderr
    assert "PIP_NO_INDEX=1 PIP_FIND_LINKS=" in done.stderr
