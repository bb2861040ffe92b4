"""`qscope bench`: ratios within one run, as a table and as JSON with device and versions."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from qscope_jax.benchmarks.forward import bench_forward
from qscope_jax.benchmarks.load import bench_load
from qscope_jax.jobs.run import Run


@dataclass(frozen=True)
class Config:
    """Measure speed and memory on this machine, as ratios within one run."""

    what: tuple[Literal["forward", "load"], ...] = ("forward", "load")
    """Which benchmarks: `forward` against transformers (needs torch), `load` for peak memory."""
    rounds: int = 20
    """Pairs per ratio."""
    out: Path = Path("qscope-out/bench")
    """Folder for bench.json and manifest.json."""


def run(config: Config) -> None:
    """Runs the benchmarks one after the other and prints each as it is done."""
    benchmarks = {
        "forward": lambda: bench_forward(rounds=config.rounds),
        "load": bench_load,
    }
    with Run("bench", config, config.out, total=len(config.what)) as job:
        results: dict[str, Any] = {}
        for name in config.what:
            results[name] = benchmarks[name]()
            print(f"{name}: {json.dumps(results[name], indent=2)}")
            job.progress(benchmarks=1)
        job.record(device=jax.devices()[0].device_kind, results=results)
