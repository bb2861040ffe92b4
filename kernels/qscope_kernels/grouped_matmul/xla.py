"""The portable form: one group after another, its rows in tiles; loops run as often as the sizes ask, not more.

For a group g and a tile of its rows:  out[rows] = x[rows] @ w[g],  dx[rows] = dy[rows] @ w[g].T  and
dw[g] += x[rows].T @ dy[rows].  Nothing that is made grows with the number of groups, and the matrix of a group without
rows is never read. A TPU has `lax.ragged_dot`, which elsewhere expands to every row times every matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from qscope_kernels.manual_axes import alike

Carry = TypeVar("Carry")


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, within, precision) -> jax.Array:
    """x [n, d] times the matrix of w [e, d, m] that each row's group names; zero rows past the groups."""
    # Inside `shard_map` these may vary along different mesh axes; the transpose of this cast sums gradients there.
    arrays = x, w, jax.lax.stop_gradient(within), group_sizes
    leaves, tree = jax.tree.flatten(arrays)
    return _grouped_matmul(precision, *jax.tree.unflatten(tree, alike(leaves)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(precision, x, w, within, group_sizes):
    return _rows_times_matrices(x, *_place(w, within), group_sizes, contract=2, precision=precision)


def _place(w, within) -> tuple[jax.Array, jax.Array]:
    """Where to read: arrays [l, e, d, m] and the layer in them."""
    return (w[None], jnp.int32(0)) if within is None else within


def _forward(precision, x, w, within, group_sizes):
    return _grouped_matmul(precision, x, w, within, group_sizes), (x, w, within, group_sizes)


def _backward(precision, saved, dy):
    x, w, within, group_sizes = saved
    dx = _rows_times_matrices(dy, *_place(w, within), group_sizes, contract=3, precision=precision)
    return dx, _rows_times_rows(x, dy, group_sizes, precision=precision), None, None


_grouped_matmul.defvjp(_forward, _backward)


def _rows_times_matrices(x, stacks, layer, group_sizes, *, contract: int, precision) -> jax.Array:
    """Rows of x times their group's matrix in stacks[layer], summed over axis `contract` of `stacks`."""
    options = {"contract": contract, "precision": precision}
    return jax.lax.platform_dependent(
        *(x, stacks, layer, group_sizes),
        tpu=partial(_rows_times_matrices_ragged, **options),
        default=partial(_rows_times_matrices_in_tiles, **options),
    )


def _rows_times_matrices_ragged(x, stacks, layer, group_sizes, *, contract, precision):
    l, e = stacks.shape[:2]
    none = jax.lax.full_like(group_sizes, 0, shape=(l * e,))
    sizes = jax.lax.dynamic_update_slice_in_dim(none, group_sizes, layer * e, 0)
    out = _ragged_dot(x, stacks.reshape(l * e, *stacks.shape[2:]), sizes, (1, contract - 1), [0], precision)
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes), out, 0)


def _rows_times_matrices_in_tiles(x, stacks, layer, group_sizes, *, contract, precision):
    n, tile = x.shape[0], _tile(x.shape[0], stacks.shape[1])

    def group(g, start, end, out):
        # Tied to the loop: jax 0.10 on CPU would otherwise widen all of a bfloat16 array before it.
        tied, g = jax.lax.optimization_barrier((stacks, g))
        matrix = jax.lax.dynamic_slice(tied, (layer, g, 0, 0), (1, 1, *stacks.shape[2:]))[0, 0]

        def rows(first, own, out):
            product = _dot(jax.lax.dynamic_slice_in_dim(x, first, tile), matrix, (1, contract - 2), precision)
            product = jnp.where(own, product, jax.lax.dynamic_slice_in_dim(out, first, tile))
            return jax.lax.dynamic_update_slice_in_dim(out, product, first, 0)

        return _each_tile(n, tile, start, end, rows, out)

    # Float32 until the end, for the same reason: there, an update in place of a bfloat16 array rewrites all of it.
    out = jax.lax.full_like(x, 0, jnp.float32, shape=(n, stacks.shape[5 - contract]))
    return _each_group(group_sizes, group, out).astype(x.dtype)


def _rows_times_rows(x, dy, group_sizes, *, precision) -> jax.Array:
    """The gradient of w: per group the float32 sum over its rows of x outer dy; 0 without rows."""
    return jax.lax.platform_dependent(
        *(x, dy, group_sizes),
        tpu=partial(_rows_times_rows_ragged, precision=precision),
        default=partial(_rows_times_rows_in_tiles, precision=precision),
    )


def _rows_times_rows_ragged(x, dy, group_sizes, *, precision):
    return _ragged_dot(x, dy, group_sizes, (0, 0), [], precision)


def _rows_times_rows_in_tiles(x, dy, group_sizes, *, precision):
    n, e, shape = x.shape[0], group_sizes.shape[0], (x.shape[1], dy.shape[1])
    tile = _tile(n, e)

    def group(g, start, end, dw):
        def rows(first, own, total):
            left, right = (jax.lax.dynamic_slice_in_dim(array, first, tile) for array in (x, dy))
            return total + _dot(jnp.where(own, left, 0), jnp.where(own, right, 0), (0, 0), precision)

        total = _each_tile(n, tile, start, end, rows, jax.lax.full_like(x, 0, jnp.float32, shape=shape))
        return jax.lax.dynamic_update_index_in_dim(dw, total.astype(dw.dtype), g, 0)

    # Always 0, which the compiler must not know: it would make one array of zeros for all gradients, and copy it.
    zero = jnp.where(jnp.sum(group_sizes) > n, jnp.sum(dy[:1]), 0)
    return _each_group(group_sizes, group, jnp.broadcast_to(zero, (e, *shape)))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], precision) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _ragged_dot(a: jax.Array, b: jax.Array, group_sizes, contract: tuple[int, int], groups: list[int], precision):
    dims = jax.lax.RaggedDotDimensionNumbers((((contract[0],), (contract[1],)), ((), ())), [0], groups)
    return jax.lax.ragged_dot_general(a, b, group_sizes, dims, precision=precision)


def _tile(n: int, e: int) -> int:
    """Rows per tile: about half the mean group, so that few rows of a last tile are wasted."""
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
    """Folds body(first row, which of its rows are still to do [tile, 1], carry) over rows start..end in tiles."""

    def step(i, carry):
        wanted = start + i * tile
        first = jnp.minimum(wanted, n - tile)  # a tile never leaves the array
        row = first + jnp.arange(tile)[:, None]
        return body(first, (row >= wanted) & (row < end), carry)

    return jax.lax.fori_loop(0, (end - start + tile - 1) // tile, step, carry)
