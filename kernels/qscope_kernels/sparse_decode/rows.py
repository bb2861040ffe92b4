"""The loop that the GPU kernels of this package share: the sum of weighted rows, read straight into registers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qscope_kernels.pallas_gpu import load, plgpu

Entry = Callable[[Any], tuple[Any, Any]]


def add_rows(total: Any, row: Callable[[Any], Any], entry: Entry, start: Any, stop: Any, *, layout: Any, unroll: int):
    """Adds weight times row for the entries start..stop-1, in that order, to total = (vector, sum of weights).

    Args:
      total: float32 (vector in `layout`, scalar).
      row: from a row's number to the ref of the row (or of some columns of it).
      entry: from an entry's number to (row number, float32 weight).
      start, stop: the range of entries; integers known while tracing, or not.
      unroll: how many rows are in flight.

    A last, incomplete group reads its last row again with weight 0, rather than one row after another.
    """

    def group(step, total):
        vector, weights = total
        first = start + step * unroll
        numbers = [jnp.minimum(first + i, stop - 1) for i in range(unroll)]
        entries = [entry(number) for number in numbers]
        # All loads come first: the compiler may keep them in flight together.
        rows = [load(row(number), layout) for number, _ in entries]
        for i, ((_, weight), vec) in enumerate(zip(entries, rows, strict=True)):
            weight = jnp.where(first + i < stop, weight, 0.0)
            vector = vector + weight * vec.astype(jnp.float32)
            weights = weights + weight
        return vector, weights

    groups = (stop - start + unroll - 1) // unroll
    return jax.lax.fori_loop(0, groups, group, total)


def nothing(size: int, layout: Any):
    """The empty sum, where `add_rows` starts: (zeros [size] in `layout`, 0)."""
    return plgpu.layout_cast(jnp.zeros((size,), jnp.float32), layout), jnp.float32(0)
