"""The definition: every product, added to the row of its latent."""

import jax
import jax.numpy as jnp


def sparse_outer(
    values: jax.Array, indices: jax.Array, rows: jax.Array, *, latents: int
) -> tuple[jax.Array, jax.Array]:
    """Makes all products of values [n, k] and rows [n, d] as [n, k, d], then adds them up by index."""
    values, indices = values.astype(jnp.float32), jnp.clip(indices, 0, latents - 1)
    products = values[:, :, None] * rows.astype(jnp.float32)[:, None, :]
    zeros = jnp.zeros_like(products, shape=(latents, rows.shape[1]))
    return zeros.at[indices].add(products), zeros[:, 0].at[indices].add(values)
