"""A tiny training run: the command, what it leaves, and how it is started as a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from qscope_jax import cli

ROOT = Path(__file__).parents[2]
# 12 steps of 128 tokens over two layers, two batches in the buffer, a checkpoint every 4 steps, a line every 3.
SMALL = (
    *("--batch-tokens", "128", "--row-length", "16", "--shards", "4", "--buffer-bytes", "32768", "--steps", "12"),
    *("--width", "32", "--k", "4", "--aux-k", "4", "--dead-after", "256", "--lr", "0.01", "--precision", "parity"),
    *("--checkpoint-every", "4", "--log-every", "3", "--judge-every", "6", "--eval-tokens", "128", "--mesh", "1x1"),
)


def command(release, out, *options):
    """The arguments; later options win."""
    return ["train-sae", "--model", str(release / "model"), "--data", "synthetic", "--out", str(out), *SMALL, *options]


def train(release, out, *options):
    return cli.main(command(release, out, *options))


def manifest(out, name="manifest.json"):
    return json.loads((out / name).read_text(encoding="utf-8"))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def results(out):
    """Every file that a run leaves for its user, by name: all but checkpoints, and manifests, which hold times."""
    paths = [out / "metrics.jsonl", *(path for path in (out / "sae").rglob("*") if path.is_file())]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def start(release, out, cache, *options, **environment):
    """The command as a process, whose programs are compiled once for all."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **environment,
    }
    program = "import sys; from qscope_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-P", "-c", program, *command(release, out, *options)]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Waits for its good end, and returns what it told."""
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return told


def until(process, ready, deadline=240):
    """Waits until it is ready, or the process has ended."""
    end = time.monotonic() + deadline
    while process.poll() is None and not ready():
        assert time.monotonic() < end, "the process neither worked nor ended"
        time.sleep(0.005)


def lines_of(out):
    """Which file metrics.jsonl is, as a run that goes on writes a new one, and how many lines it has; None: none."""
    path = out / "metrics.jsonl"
    return (path.stat().st_ino, path.read_bytes().count(b"\n")) if path.exists() and path.stat().st_size else None
