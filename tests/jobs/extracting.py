"""Texts to extract from, the command that does it, and what it leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from qscope_jax import cli
from qscope_jax.data.store import FeatureStore

ROOT = Path(__file__).parents[2]
LINE = "the quick brown fox jumps over lazy dog; Übung macht den Meister 習慣 成 自然"
WORDS = LINE.split()
SMALL = ("--batch-tokens", "256", "--max-length", "32")


def texts(n, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(n)]


def write_rows(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def damaged_rows(n, every, seed=0):
    """Rows with an id, of which every so-manyth is damaged in one of four ways; and which are."""
    rows, bad = [], set()
    for i, text in enumerate(texts(n, seed, longest=9)):
        rows.append({"id": f"d{i}", "text": text, "n": i})
        if i % every == 3:
            bad.add(i)
            fault = (i // every) % 4
            rows[-1] = [{"id": f"d{i}", "text": ""}, {"id": f"d{i}"}, {"id": f"d{i}", "text": 5}, '{"text": "cut\n'][
                fault
            ]
    return rows, bad


def command(release, data, out, *options):
    sources = ["--model", str(release / "model"), "--sae", str(release / "sae")]
    return ["extract", str(data), *sources, "--out", str(out), *SMALL, *options]


def extract(release, data, out, *options):
    assert cli.main(command(release, data, out, *options)) == 0
    return FeatureStore(out)


def manifest(out, name="manifest.json"):
    return json.loads((out / name).read_text(encoding="utf-8"))


def results(out):
    """Every file that holds results, by name."""
    kept = ("documents", "tokens", "errors")
    paths = [path for folder in kept for path in (out / folder).glob("*")] + [out / "errors.jsonl", out / "store.json"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def start(release, data, out, cache, *options):
    return launch(command(release, data, out, *options), cache)


def launch(arguments, cache):
    """A command as a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    program = "import sys; from qscope_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


def stop_when(process, number, ready, deadline=240):
    """Sends a signal as soon as `ready()`, unless the process has ended by itself; returns its exit code."""
    end = time.monotonic() + deadline
    while process.poll() is None and not ready():
        assert time.monotonic() < end, "the process neither worked nor ended"
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(number)
    _, told = process.communicate(timeout=deadline)
    return process.returncode, told


def check_exactly_once(out, rows, bad):
    """Every id once, in the tables or in errors.jsonl."""
    ids = pq.read_table(out / "documents").column("id").to_pylist()
    errors = [json.loads(line) for line in (out / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ids == [f"d{i}" for i in range(len(rows)) if i not in bad]
    assert [error["number"] for error in errors] == sorted(bad)
    assert all(error["reason"] and error["line"] == error["number"] + 1 for error in errors)
