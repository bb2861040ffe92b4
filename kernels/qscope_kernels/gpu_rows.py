"""The loop that the decode and the outer product share on a GPU: sums of weighted rows, straight from memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qscope_kernels.pallas_gpu import WARPGROUP, load, plgpu, vector_length


def nothing(columns: int, layout: Any) -> tuple[Any, Any]:
    """The empty sum, where `add_rows` starts: (zeros [columns], 0)."""
    return plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout), jnp.float32(0)


def add_rows(
    total: tuple[Any, Any],
    row: Callable[[Any], Any],
    entry: Callable[[Any], tuple[Any, Any, Any]],
    start: Any,
    stop: Any,
    *,
    layout: Any,
    unroll: int,
) -> tuple[Any, Any]:
    """Adds weight times row for the entries start..stop-1, in this order, to total = (float32 vector, float32 scalar).

    Args:
      total: the sum so far, from `nothing`.
      row: from a row's number to the ref of the row, or of some columns of it.
      entry: from an entry's number to (row number, weight, what it adds to the scalar).
      start, stop: the range of entries; integers known while tracing, or not.
      layout: of the vector in registers.
      unroll: how many rows are in flight.

    A last group that is not full reads its last row again, for nothing, rather than the rest one after another.
    """
    full = isinstance(start, int) and isinstance(stop, int) and (stop - start) % unroll == 0

    def group(step, total):
        vector, scalar = total
        numbers = [start + step * unroll + i for i in range(unroll)]
        entries = [entry(number if full else jnp.minimum(number, stop - 1)) for number in numbers]
        # All loads come first, so that they are in flight together.
        vectors = [load(row(at), layout) for at, _, _ in entries]
        for number, (_, weight, amount), values in zip(numbers, entries, vectors, strict=True):
            product = weight * values.astype(jnp.float32)
            if not full:  # the product, not the weight: 0 times infinity is no nothing
                inside = jnp.broadcast_to(number < stop, product.shape)
                product, amount = jnp.where(inside, product, 0.0), jnp.where(number < stop, amount, 0.0)
            vector, scalar = vector + product, scalar + amount
        return vector, scalar

    return jax.lax.fori_loop(0, (stop - start + unroll - 1) // unroll, group, total)


def in_parts(matrix: jax.Array, columns: int) -> jax.Array:
    """A matrix [f, d] as [f, parts, columns]: at most `columns` wide, read in long pieces, as wide as possible.

    Kernels index parts instead of slicing columns, so that the compiler knows how reads are aligned.
    """
    f, d = matrix.shape
    widths = [c for c in range(WARPGROUP, max(columns, WARPGROUP) + 1, WARPGROUP) if d % c == 0]
    best = max(widths, key=lambda c: (vector_length(c, matrix.dtype), c))
    return matrix.reshape(f, d // best, best)


def divide(number: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder of a number that is not negative."""
    return jax.lax.div(number, jnp.int32(by)), jax.lax.rem(number, jnp.int32(by))


def unsuited_rows(shape: tuple[int, ...], dtype: Any, indices: jax.Array, longest: int) -> str | None:
    """Why rows of a matrix [f, d] of this type cannot be gathered by these indices, or None."""
    if shape[1] % WARPGROUP or not 0 < shape[1] <= longest:
        return f"d = {shape[1]} is no multiple of {WARPGROUP} up to {longest}"
    if shape[0] * shape[1] >= 2**31:
        return f"a matrix {list(shape)} has more elements than 31 bits count"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"rows of {dtype}"
    if indices.dtype != jnp.int32 or 0 in (shape[0], *indices.shape):
        return f"{indices.dtype} indices {list(indices.shape)} of {shape[0]} rows"
    return None
