"""What this device reaches at best, measured: bytes read and written per second, FLOP/s of a matmul."""

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from qscope_kernels.dispatch import device_of

from qscope_jax.benchmarks.paired import seconds
from qscope_jax.benchmarks.rows import Row, Setting


def bench_ceilings(setting: Setting) -> Iterator[Row]:
    """A row for each ceiling."""
    yield _row("memory, read and written", copy_bandwidth(setting.sample), "B/s")
    yield _row(f"matmul, {_side()} cubed, {setting.dtype}", matmul_rate(setting.dtype, setting.sample), "FLOP/s")


@functools.cache
def copy_bandwidth(sample: float) -> float:
    """Bytes per second, read and written, of adding one in place to an array that no cache holds."""
    count = 1 << (26 if device_of().platform == "cpu" else 29)
    held = [jax.random.normal(jax.random.key(0), (count,), jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def call() -> jax.Array:
        held[0] = add(held[0])
        return held[0]

    return 2 * held[0].nbytes / seconds(call, sample=sample)


@functools.cache
def matmul_rate(dtype: Any, sample: float) -> float:
    """FLOP/s of a square matmul of this dtype with its result in the same; float32 multiplies at full precision."""
    side = _side()
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), dtype) for seed in (0, 1))
    call = partial(jax.jit(partial(jnp.matmul, precision=precision(dtype))), a, b)
    return 2 * side**3 / seconds(call, sample=sample)


def precision(dtype: Any) -> jax.lax.Precision:
    """That of the encoder: float32 at full precision, narrower types in their own products."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _side() -> int:
    return 2048 if device_of().platform == "cpu" else 8192


def _row(what: str, rate: float, unit: str) -> Row:
    return {"case": "ceiling", "what": what, "rate": rate, "unit": unit}
