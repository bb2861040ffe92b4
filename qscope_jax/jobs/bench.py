"""`qscope bench`: ratios within one run, as a table and as JSON with device and versions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from qscope_jax.benchmarks.compile import bench_compile
from qscope_jax.benchmarks.extract import bench_extract
from qscope_jax.benchmarks.forward import bench_forward, bench_prefill
from qscope_jax.benchmarks.load import bench_load
from qscope_jax.benchmarks.moe import bench_moe
from qscope_jax.files.atomic import write_json
from qscope_jax.jobs.run import Run, versions

What = Literal["forward", "prefill", "moe", "compile", "extract", "load"]


@dataclass(frozen=True)
class Config:
    """Measure speed and memory on this machine, as ratios within one run."""

    what: tuple[What, ...] = get_args(What)
    """`forward` against transformers (needs torch), `prefill` of linear against full attention, `moe` of 128 experts
    against 16, `compile` of 64 layers against 8, `extract` against its own step, `load` for peak memory."""
    rounds: int = 20
    """Pairs per ratio; fewer where one takes minutes."""
    out: Path = Path("qscope-out/bench")
    """Folder for bench.json and manifest.json."""


def run(config: Config) -> None:
    """Runs the benchmarks one after the other and prints each as it is done.

    Raises:
      ValueError: torch is not installed for `forward`, or a compilation cache is in the way of `compile`.
    """
    benchmarks = {
        "forward": lambda: bench_forward(rounds=config.rounds),
        "prefill": lambda: bench_prefill(rounds=config.rounds),
        "moe": lambda: bench_moe(rounds=config.rounds),
        "compile": lambda: bench_compile(rounds=config.rounds),
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
