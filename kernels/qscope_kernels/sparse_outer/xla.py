"""The portable form: one slot at a time, so that no [n, k, d] array exists.

Not deterministic on CUDA, where XLA adds with atomics, in whatever order they come; the GPU kernel is.
"""

import jax
import jax.numpy as jnp


def sparse_outer(
    values: jax.Array, indices: jax.Array, rows: jax.Array, *, latents: int
) -> tuple[jax.Array, jax.Array]:
    """Scatter-adds values [n, k] times rows [n, d], slot after slot, into [f, d]."""
    rows = rows.astype(jnp.float32)
    values, indices = values.T.astype(jnp.float32), jnp.clip(indices.T, 0, latents - 1)

    # Zeros of its own, which the compiler takes for something else: loops that begin with the same zeros, as those for
    # both matrices would, begin by copying them.
    zero = jnp.any(jnp.isnan(values) & (values == 0)).astype(jnp.float32)
    sums, amounts = jnp.broadcast_to(zero, (latents, rows.shape[1])), jnp.zeros_like(rows, shape=(latents,))
    (sums, amounts, _), _ = jax.lax.scan(_add, (sums, amounts, rows), (values, indices))
    return sums, amounts


def _add(state, slot):
    """Adds one slot of every token to the sums of the state, which holds the rows too."""
    # Nothing is closed over, so that outside `jit` the loop is compiled once, not at every call.
    (sums, amounts, rows), (value, index) = state, slot
    return (sums.at[index].add(value[:, None] * rows), amounts.at[index].add(value), rows), None
