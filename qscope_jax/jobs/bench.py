"""`qscope bench`: ratios within one run, as a table and as JSON with device and versions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from qscope_jax.benchmarks.ceilings import bench_ceilings
from qscope_jax.benchmarks.compile import bench_compile
from qscope_jax.benchmarks.end_to_end import bench_end_to_end
from qscope_jax.benchmarks.extract import bench_extract
from qscope_jax.benchmarks.forward import bench_forward, bench_prefill
from qscope_jax.benchmarks.generate import bench_generate
from qscope_jax.benchmarks.load import bench_load
from qscope_jax.benchmarks.moe import bench_moe
from qscope_jax.benchmarks.paired import FEWEST
from qscope_jax.benchmarks.rows import Row, Setting, markdown, setting_of
from qscope_jax.benchmarks.sparse import bench_decode, bench_encode, bench_gradient, check_impl
from qscope_jax.benchmarks.statistics import bench_statistics
from qscope_jax.benchmarks.steer import bench_steer
from qscope_jax.benchmarks.step import bench_step
from qscope_jax.benchmarks.train import bench_train
from qscope_jax.files.atomic import write_json, write_text
from qscope_jax.jobs.run import Run, versions

Sparse = Literal["ceilings", "encode", "decode", "gradient", "step", "end_to_end"]
Whole = Literal["forward", "generate", "steer", "prefill", "moe", "compile", "extract", "statistics", "train", "load"]
What = Literal[Whole, Sparse]

_SPARSE: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "ceilings": bench_ceilings,
    "encode": bench_encode,
    "decode": bench_decode,
    "gradient": bench_gradient,
    "step": bench_step,
    "end_to_end": bench_end_to_end,
}
_DEVICE_PACKAGES = ("torch", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "triton")


@dataclass(frozen=True)
class Config:
    """Measure speed and memory on this machine, as ratios within one run."""

    what: tuple[What, ...] = get_args(What)
    """`forward` and `generate` against transformers (need torch), `steer` against not steering, `prefill` of linear
    against full attention, `moe` of 128 experts against 16, `compile` of 64 layers against 8, `extract` and `train`
    against their own arithmetic, `statistics` against extraction, `load` for peak memory; the sparse operations:
    `encode` over the bare matmul, `decode`, `gradient` and a training `step` over dense ones, `end_to_end`: forward and
    encode over forward, and `ceilings`: what this device reaches."""
    rounds: int = 20
    """Pairs per ratio; fewer where one takes minutes."""
    cases: tuple[str, ...] = ()
    """Shapes of the sparse operations, such as d2048-f32768-k50; by default one on a CPU and four elsewhere."""
    tokens: int | None = None
    """Tokens per call of the sparse operations; by default 512 on a CPU and 8,192 elsewhere."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the sparse operations; by default float32 on a CPU and bfloat16 elsewhere."""
    impl: tuple[str, ...] = ()
    """Implementations to compare, such as xla; by default the kernels of this device and the portable form. A training
    `step` takes what training takes."""
    budget: float = 20.0
    """Seconds per ratio of the sparse operations; where they do not suffice there are fewer pairs, at least five."""
    out: Path = Path("qscope-out/bench")
    """Folder for bench.json, bench.md and manifest.json."""


def run(config: Config) -> None:
    """Runs the benchmarks one after the other and prints each as it is done.

    Raises:
      ValueError: too few rounds, torch is not installed for `forward`, a compilation cache is in the way of `compile`,
        or a case or an implementation is unknown.
      Interrupted: SIGTERM or SIGINT came; the rows measured so far are written.
    """
    check_impl(config.impl)
    if config.rounds < FEWEST:
        raise ValueError(f"--rounds {config.rounds}: quartiles need at least {FEWEST} pairs")
    setting = setting_of(
        cases=config.cases, tokens=config.tokens, dtype=config.dtype, impl=config.impl, rounds=config.rounds,
        budget=config.budget,
    )  # fmt: skip
    benchmarks = {
        "forward": lambda: bench_forward(rounds=config.rounds),
        "generate": lambda: bench_generate(rounds=config.rounds),
        "steer": lambda: bench_steer(rounds=config.rounds),
        "prefill": lambda: bench_prefill(rounds=config.rounds),
        "moe": lambda: bench_moe(rounds=config.rounds),
        "compile": lambda: bench_compile(rounds=config.rounds),
        "extract": lambda: bench_extract(rounds=config.rounds),
        "statistics": lambda: bench_statistics(rounds=config.rounds),
        "train": lambda: bench_train(rounds=config.rounds),
        "load": bench_load,
    }
    with Run("bench", config, config.out, total=len(config.what)) as job:
        results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "versions": all_versions()}
        for name in config.what:
            if name in _SPARSE:
                results[name] = []
                for row in _SPARSE[name](setting):
                    results[name].append(row)
                    print("\n".join(markdown([row])[2 if len(results[name]) > 1 else 0 :]), flush=True)
                    _write(job.out, results)
                    if job.stopping:
                        raise job.interrupted(f"{len(results[name])} ratios of {name} are measured", resumes=False)
            else:
                results[name] = benchmarks[name]()
                print("\n".join(table(name, results[name])), flush=True)
            _write(job.out, results)
            job.progress(benchmarks=1)


def all_versions() -> dict[str, str]:
    """`versions`, and those of what makes the programs of accelerators and of what ours are compared with."""
    return versions(*_DEVICE_PACKAGES)


def table(name: str, result: Any) -> list[str]:
    """One indented line per figure; nested results follow their heading."""
    lines = [f"{name}:"]
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"  {line}" for line in table(key, value)]
        else:
            lines.append(f"  {key:<18} {f'{value:,.4g}' if isinstance(value, float) else value}")
    return lines


def _write(out: Path, results: dict[str, Any]) -> None:
    """bench.json, and the rows of the sparse operations as bench.md; after every row, so that a stop loses none."""
    write_json(out / "bench.json", results)
    rows = [row for name in _SPARSE for row in results.get(name, ())]
    if rows:
        said = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
        write_text(out / "bench.md", "\n".join([f"{results['device']}; {said}", "", *markdown(rows), ""]))
