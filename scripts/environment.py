"""Questions about a Python environment for `bootstrap.sh`; standard library only, since nothing is installed yet.

python environment.py missing PYPROJECT [EXTRA ...]   prints which requirements this interpreter lacks
python environment.py reach                           says on stderr why pip finds no packages, within `_PATIENCE`
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

_PATIENCE = 12


def missing(pyproject: Path, extras: list[str]) -> Iterator[str]:
    """What the environment lacks: versions of our own requirements, and the presence of everything that they need."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        try:
            from pip._vendor.packaging.requirements import Requirement
        except ImportError:
            yield "packaging"
            return
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    pending, seen = [(Requirement(line), True) for line in lines], set[str]()
    while pending:
        wanted, direct = pending.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}) and direct:
            continue
        try:
            found = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{wanted.name}{wanted.specifier}"
            continue
        if direct and not wanted.specifier.contains(found.version, prereleases=True):
            yield f"{wanted.name}{wanted.specifier} (has {found.version})"
        key = f"{wanted.name.lower()}{sorted(wanted.extras)}"
        if key in seen:
            continue
        seen.add(key)
        for line in found.requires or ():
            need = Requirement(line)
            named = [{"extra": extra} for extra in wanted.extras or {""}]
            if need.marker is None or any(need.marker.evaluate(extra) for extra in named):
                pending.append((need, False))


def reach() -> str | None:
    """None if pip finds the build tool where it is set to look; else what it says. Short waits, no retries."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--dry-run"]
    command += ["--ignore-installed", "--no-deps", "--quiet", "--timeout", "4", "--retries", "0", "setuptools>=77"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no answer within {_PATIENCE} seconds"
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()


def main(argv: list[str]) -> int:
    """Exit code 0: nothing missing, or an index that answers."""
    if argv[0] == "missing":
        lacks = sorted(set(missing(Path(argv[1]), argv[2:])))
        print("\n".join(lacks))
        return 1 if lacks else 0
    told = reach()
    if told:
        print(told, file=sys.stderr)
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
