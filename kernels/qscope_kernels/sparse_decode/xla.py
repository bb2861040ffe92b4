"""The portable forms: a few slots, or a few tokens, at a time, so that no [n, k, d] array exists.

The gathers of a group of slots stand in one expression, which compilers fuse into one pass over the sums; from about a
dozen on, XLA for CUDA fuses them no more and stores every one.
"""

import jax
import jax.numpy as jnp

from qscope_kernels.blocks import map_blocks

_SLOTS = 10  # per group
# Bound on the gathered numbers that exist at once: 16 MiB of float32.
_BLOCK_ELEMENTS = 1 << 22


def sparse_decode(values: jax.Array, indices: jax.Array, w_dec: jax.Array) -> jax.Array:
    """Float32 sum over the slots of values [n, k], each adding one gathered row of w_dec [f, d] per token."""
    n, k = values.shape
    values, indices = values.T.astype(jnp.float32), indices.T

    # Like `values`: inside shard_map, what differs between devices must do so from the start.
    state = jnp.zeros_like(values, shape=(n, w_dec.shape[1])), w_dec
    groups, rest = divmod(k, _SLOTS)
    if rest:
        state, _ = _add(state, (values[:rest], indices[:rest]))
    if groups:
        slots = tuple(part[rest:].reshape(groups, _SLOTS, n) for part in (values, indices))
        state, _ = jax.lax.scan(_add, state, slots)
    return state[0]


def _add(state, slots):
    """Adds a group of slots to the sums [n, d] of the state, which holds w_dec too."""
    # Nothing is closed over, so that outside `jit` the loop is compiled once, not at every call.
    total, w_dec = state
    # Tied to the loop: jax 0.10 on CPU would otherwise widen all of a bfloat16 array before it.
    w, (values, indices) = jax.lax.optimization_barrier((w_dec, slots))
    for value, index in zip(values, indices, strict=True):
        total = total + value[:, None] * _rows(w, index)
    return (total, w_dec), None


def gather_dot(rows: jax.Array, indices: jax.Array, w: jax.Array) -> jax.Array:
    """Float32 products [n, k] of rows [n, d] with the rows of w [f, d] that indices [n, k] name, tokens in blocks."""

    def products(rows, indices):
        tied, rows, indices = jax.lax.optimization_barrier((w, rows, indices))
        return jnp.einsum("nd,nad->na", rows.astype(jnp.float32), _rows(tied, indices), precision="highest")

    return map_blocks(products, (rows, indices), _BLOCK_ELEMENTS // max(1, indices.shape[1] * w.shape[1]))


def _rows(w: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take(w, indices, axis=0, mode="clip").astype(jnp.float32)
