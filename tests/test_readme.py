"""README's examples, run as written and in their order, in one empty folder: what a newcomer would see.

Every ```python block is one case; of every ```bash block, each command that starts with `qscope `. A line that starts
with `printf ` or `echo ` makes an input for the lines after it. Other lines (installing, the hub) are not run.
"""

import os
import re
import subprocess
import sys
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the examples run, with a `qscope` on the PATH even where the package is only on the import path."""
    tools = tmp_path_factory.mktemp("bin")
    command = tools / "qscope"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m qscope_jax.cli "$@"\n')
    command.chmod(0o755)
    where = tmp_path_factory.mktemp("readme")
    (where.parent / "readme-path").write_text(str(tools))
    return where


@pytest.mark.parametrize("example", FOUND, ids=lambda example: f"line-{example.line}")
def test_readme_runs_as_written(example, folder):
    tools = (folder.parent / "readme-path").read_text()
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-P", "-c", example.text]
    if example.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", example.text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (
        f"README.md:{example.line}\n{example.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
