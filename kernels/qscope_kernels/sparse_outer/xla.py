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

    def add_slot(total, slot):
        value, index = slot
        return (total[0].at[index].add(value[:, None] * rows), total[1].at[index].add(value)), None

    start = jnp.zeros_like(rows, shape=(latents, rows.shape[1])), jnp.zeros_like(rows, shape=(latents,))
    return jax.lax.scan(add_slot, start, (values, indices))[0]
