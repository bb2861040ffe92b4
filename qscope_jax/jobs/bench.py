"""`qscope bench`: ratios within one run, as a table and as JSON with device and versions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from qscope_jax.benchmarks.extract import bench_extract
from qscope_jax.benchmarks.forward import bench_forward
from qscope_jax.benchmarks.load import bench_load
from qscope_jax.files.atomic import write_json
from qscope_jax.jobs.run import Run, versions

What = Literal["forward", "extract", "load"]


@dataclass(frozen=True)
class Config:
    """Measure speed and memory on this machine, as ratios within one run."""

    what: tuple[What, ...] = ("forward", "extract", "load")
    """`forward` against transformers (needs torch), `extract` against its own step, `load` for peak memory."""
    rounds: int = 20
    """Pairs per ratio."""
    out: Path = Path("qscope-out/bench")
    """Folder for bench.json and manifest.json."""


def run(config: Config) -> None:
    """Runs the benchmarks one after the other and prints each as it is done.

    Raises:
      ValueError: `forward` was asked for and torch is not installed.
    """
    benchmarks = {
        "forward": lambda: bench_forward(rounds=config.rounds),
        "extract": lambda: bench_extract(rounds=config.rounds),
        "load": bench_load,
    }
    with Run("bench", config, config.out, total=len(config.what)) as job:
        results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "versions": versions()}
        for name in config.what:
            results[name] = benchmarks[name]()
            print("\n".join(table(name, results[name])), flush=True)
            write_json(config.out / "bench.json", results)
            job.progress(benchmarks=1)


def table(name: str, result: Any) -> list[str]:
    """One indented line per figure; nested results follow their heading."""
    lines = [f"{name}:"]
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"  {line}" for line in table(key, value)]
        else:
            lines.append(f"  {key:<18} {f'{value:,.4g}' if isinstance(value, float) else value}")
    return lines
