"""What the benchmarks of the sparse operations share: what to measure, and a row of the table per measured pair."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from qscope_kernels.cases import RELEASED, Case
from qscope_kernels.dispatch import Kernel, automatic, device_of

from qscope_jax.benchmarks.paired import paired

Row = dict[str, Any]
Call = Callable[[], Any]

_SAMPLE = 0.02  # seconds; a thousand times what enqueueing a call costs
_ON_CPU = ("d2048-f32768-k50",)
_ELSEWHERE = ("d2048-f32768-k50", "d4096-f65536-k50", "d2048-f131072-k100", "d5120-f81920-k100")


class Setting(NamedTuple):
    """What is measured. `impl` names implementations to measure; none: all that the device has.

    Nothing needs to rotate between buffers: the weights of the smallest released case (134 MB in bfloat16) are beyond
    any cache, and so are pre-activations and gradients.
    """

    cases: tuple[Case, ...]
    tokens: int
    dtype: Any
    impl: tuple[str, ...] = ()
    rounds: int = 20
    sample: float = 0.0
    budget: float = math.inf


class Work(NamedTuple):
    """What the numerator of a ratio does in one call, and the device's measured ceiling for it, where there is one."""

    amount: float
    unit: str
    ceiling: float | None = None


def setting_of(
    *, cases: Sequence[str] = (), tokens: int | None = None, dtype: str | None = None, impl: Sequence[str] = (),
    rounds: int = 20, budget: float = 20.0,
) -> Setting:  # fmt: skip
    """The setting for this device, with its defaults filled in.

    Raises:
      ValueError: a case that was not released; their names.
    """
    known, cpu = {case.name: case for case in RELEASED}, device_of().platform == "cpu"
    names = tuple(cases) or (_ON_CPU if cpu else _ELSEWHERE)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--cases {' '.join(unknown)}: expected some of {', '.join(known)}")
    return Setting(
        cases=tuple(known[name] for name in names),
        tokens=tokens or (512 if cpu else 8192),
        dtype=jnp.dtype(dtype or ("float32" if cpu else "bfloat16")),
        impl=tuple(impl),
        rounds=rounds,
        sample=0.0 if cpu else _SAMPLE,  # a CPU computes while it is asked, or several calls at once
        budget=budget,
    )


def implementations(setting: Setting, kernels: Mapping[str, Kernel]) -> tuple[str, ...]:
    """Names of what to measure of an operation: its kernels for this device, then the portable form."""
    platform = device_of().platform
    held = (*(name for name, kernel in kernels.items() if kernel.platform == platform), "xla")
    return tuple(name for name in setting.impl if name in (*held, "ref")) or held


def picked(setting: Setting, kernels: Mapping[str, Kernel], *arrays: jax.Array, **options: Any) -> str:
    """The name of the implementation that runs where none is asked for, or the first that was asked for."""
    if setting.impl:
        return implementations(setting, kernels)[0]
    return automatic(kernels, *arrays, **options) or "xla"


def measure(
    setting: Setting, case: str, what: str, top: Call | None, bottom: Call | None, work: Work | None = None
) -> Iterator[Row]:
    """A row with time(top) / time(bottom), or one that says why there is none; `work` is that of one call of `top`.

    One kernel that does not compile, or one alternative that does not fit into memory, must not cost all other rows.
    A side that is None is not there (no torch): no row.
    """
    if top is None or bottom is None:
        return
    row: Row = {"case": case, "what": what}
    try:
        row |= paired(bottom, top, rounds=setting.rounds, sample=setting.sample, budget=setting.budget)
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        yield row | {"failed": f"{type(error).__name__}: {first[:300]}"}
        return
    if work is not None:
        rate = work.amount / row["b_seconds"]
        row |= {"rate": rate, "unit": work.unit, **({} if work.ceiling is None else {"share": rate / work.ceiling})}
    yield row


def markdown(rows: Sequence[Row]) -> list[str]:
    """The rows as a table in Markdown."""
    titles = ("case", "time of / time of", "ratio", "spread", "pairs", "rate of the first", "of the ceiling")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        if "failed" in row:
            cells = [row["failed"].replace("|", "\\|"), "", "", "", ""]
        else:
            measured = "ratio" in row
            pairs = [f"{row['ratio']:.3g}", f"±{row['spread']:.2g}", f"{row['rounds']:.0f}"] if measured else [""] * 3
            cells = [*pairs, rate_text(row), f"{row['share']:.0%}" if "share" in row else ""]
        lines.append(f"| {' | '.join([row['case'], row['what'], *cells])} |")
    return lines


def rate_text(row: Row) -> str:
    """The rate with a prefix, such as 3.91 TB/s; empty where there is none."""
    if "rate" not in row:
        return ""
    power = max(0, min(4, int(math.log10(max(row["rate"], 1)) // 3)))
    return f"{row['rate'] / 1000**power:.3g} {['', 'k', 'M', 'G', 'T'][power]}{row['unit']}"


def relative_l2(got: jax.Array, want: jax.Array) -> float:
    """|got - want| / |want|, in float32; what both sides of a row may differ by is for the tests to say."""
    got, want = (jnp.asarray(a, jnp.float32) for a in (got, want))
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
