"""README's examples, run as written, in their order, in one empty folder and one Python session, as a newcomer would.

Every ```python block is one case; of every ```bash block, each command that starts with `qscope `. A line that starts
with `printf ` or `echo ` makes an input for the lines after it. Other lines (installing, the hub) are not run.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).parents[1] / "README.md"
RUN = ("qscope ", "printf ", "echo ")


class Example(NamedTuple):
    line: int
    language: str
    text: str


def examples(readme: str) -> list[Example]:
    """The code blocks of a page, bash split into its commands; a trailing backslash joins lines."""
    found = []
    for block in re.finditer(r"^```(python|bash)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL):
        line = readme.count("\n", 0, block.start(2)) + 1
        if block[1] == "python":
            found.append(Example(line, "python", block[2]))
            continue
        for command in re.finditer(r"(?:[^\n]*\\\n)*[^\n]+", block[2]):
            if command[0].startswith(RUN):
                found.append(Example(line + block[2].count("\n", 0, command.start()), "bash", command[0]))
    return found


FOUND = examples(README.read_text(encoding="utf-8") if README.exists() else "")


def test_examples_are_found_with_their_lines():
    page = "# x\n```python\nprint(1)\n```\n\n```bash\npip install x\nqscope info \\\n  demo\nqscope demo\n```\n"
    page += "```text\nqscope no\n```\n"
    assert examples(page) == [
        Example(3, "python", "print(1)\n"),
        Example(8, "bash", "qscope info \\\n  demo"),
        Example(10, "bash", "qscope demo"),
    ]


def test_the_page_has_its_five_examples():
    assert (
        len([example for example in FOUND if example.text.startswith("qscope ") or example.language == "python"]) >= 5
    )


class Reader:
    """Someone who follows the page from the top: one folder, one Python session, and `qscope` on the PATH."""

    def __init__(self, folder: Path, tools: Path):
        self.folder, self.session, self.done = folder, {"__name__": "__main__"}, 0
        # Stands for the console script where the package is only on the import path.
        command = tools / "qscope"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m qscope_jax.cli "$@"\n')
        command.chmod(0o755)
        # The examples run in another folder than the tests: a relative import path must mean the same there.
        path = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        self.environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(path),
        }

    def follow(self, example: Example) -> None:
        """Runs the page up to and including `example`, from where it was left."""
        while self.done <= FOUND.index(example):
            self.done += 1
            self.run(FOUND[self.done - 1])

    def run(self, example: Example) -> None:
        if example.language == "python":
            # Blank lines in front, so that a traceback names README's own line.
            code = compile("\n" * (example.line - 1) + example.text, str(README), "exec")
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                exec(code, self.session)
            return
        command = ["bash", "-euo", "pipefail", "-c", example.text]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, (
            f"README.md:{example.line}: {example.text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    return Reader(tmp_path_factory.mktemp("readme"), tmp_path_factory.mktemp("bin"))


@pytest.mark.parametrize("example", FOUND, ids=lambda example: f"line-{example.line}")
def test_readme_runs_as_written(example, reader, monkeypatch):
    monkeypatch.chdir(reader.folder)
    reader.follow(example)
