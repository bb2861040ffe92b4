"""The portable form: one group after another, its rows in tiles; loops run as often as the sizes ask, not more.

For a group g and a tile of its rows:  out[rows] = x[rows] @ w[g];  dx[rows] = dy[rows] @ w[g].T;  dw[g] += x[rows].T @ dy[rows]

Nothing that is made grows with the number of groups, and the matrix of a group without rows is never read.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, precision) -> jax.Array:
    """x [n, d] times the matrix of w [e, d, m] that each row's group names; zero rows past the groups."""
    # Inside `shard_map` all three may vary along different mesh axes; the transpose of this cast sums gradients there.
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in (x, w, group_sizes)))
    x, w, group_sizes = (_varying(array, axes) for array in (x, w, group_sizes))
    return _grouped_matmul(precision, x, w, group_sizes)


def _varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    return jax.lax.pcast(array, tuple(axes - jax.typeof(array).manual_axis_type.varying), to="varying")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(precision, x, w, group_sizes):
    return _rows_times_matrices(precision, x, w, group_sizes, contract=1)


def _forward(precision, x, w, group_sizes):
    return _grouped_matmul(precision, x, w, group_sizes), (x, w, group_sizes)


def _backward(precision, saved, dy):
    x, w, group_sizes = saved
    dx = _rows_times_matrices(precision, dy, w, group_sizes, contract=2)
    return dx, _rows_times_rows(precision, x, dy, w, group_sizes), None


_grouped_matmul.defvjp(_forward, _backward)


def _rows_times_matrices(precision, x, w, group_sizes, *, contract: int) -> jax.Array:
    """Rows of x times their group's matrix, of which axis `contract` of w is summed over."""
    n, tile = x.shape[0], _tile(x.shape[0], w.shape[0])
    dot = partial(_dot, axes=(1, contract - 1), precision=precision)

    def group(g, start, end, out):
        # Tied to the loop: jax 0.10 on CPU would otherwise widen a whole bfloat16 stack before it.
        stack, g = jax.lax.optimization_barrier((w, g))
        matrix = jax.lax.dynamic_index_in_dim(stack, g, keepdims=False)

        def rows(first, own, out):
            product = dot(jax.lax.dynamic_slice_in_dim(x, first, tile), matrix)
            product = jnp.where(own, product, jax.lax.dynamic_slice_in_dim(out, first, tile))
            return jax.lax.dynamic_update_slice_in_dim(out, product, first, 0)

        return _each_tile(n, tile, start, end, rows, out)

    # Float32 until the end, for the same reason: there, an update in place of a bfloat16 array rewrites all of it.
    out = jax.lax.full_like(x, 0, jnp.float32, shape=(n, w.shape[3 - contract]))
    return _each_group(group_sizes, group, out).astype(x.dtype)


def _rows_times_rows(precision, x, dy, w, group_sizes) -> jax.Array:
    """The gradient of w: per group the float32 sum over its rows of x outer dy; 0 without rows."""
    n, tile = x.shape[0], _tile(x.shape[0], w.shape[0])
    dot = partial(_dot, axes=(0, 0), precision=precision)

    def group(g, start, end, dw):
        def rows(first, own, total):
            left, right = (jax.lax.dynamic_slice_in_dim(array, first, tile) for array in (x, dy))
            return total + dot(jnp.where(own, left, 0), jnp.where(own, right, 0))

        total = jax.lax.full_like(x, 0, jnp.float32, shape=w.shape[1:])
        total = _each_tile(n, tile, start, end, rows, total)
        return jax.lax.dynamic_update_index_in_dim(dw, total.astype(dw.dtype), g, 0)

    return _each_group(group_sizes, group, jax.lax.full_like(w, 0))


def _dot(a: jax.Array, b: jax.Array, *, axes: tuple[int, int], precision) -> jax.Array:
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _tile(n: int, e: int) -> int:
    """Rows per tile: half the mean group as a power of two, so that few rows of a last tile are wasted."""
    half = max(n // (2 * e), 1)
    return min(n, max(8, min(256, 1 << (half.bit_length() - 1))))


def _each_group(group_sizes: jax.Array, body: Callable[..., Carry], carry: Carry) -> Carry:
    """Folds body(group, its first row, the row behind its last, carry) over the groups that have rows."""
    ends = jnp.cumsum(group_sizes)
    (used,) = jnp.nonzero(group_sizes, size=group_sizes.shape[0])

    def step(i, carry):
        g = used[i]
        return body(g, ends[g] - group_sizes[g], ends[g], carry)

    return jax.lax.fori_loop(0, jnp.count_nonzero(group_sizes), step, carry)


def _each_tile(n: int, tile: int, start, end, body: Callable[..., Carry], carry: Carry) -> Carry:
    """Folds body(first row, which rows are the group's and new [tile, 1], carry) over rows start..end in tiles."""

    def step(i, carry):
        wanted = start + i * tile
        first = jnp.minimum(wanted, n - tile)  # a tile never leaves the array
        row = first + jnp.arange(tile)[:, None]
        return body(first, (row >= wanted) & (row < end), carry)

    return jax.lax.fori_loop(0, (end - start + tile - 1) // tile, step, carry)
