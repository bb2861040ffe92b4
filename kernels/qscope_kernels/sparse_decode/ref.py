"""The definition: gather all k rows of every token, then weigh and add them."""

import jax
import jax.numpy as jnp


def sparse_decode(values: jax.Array, indices: jax.Array, w_dec: jax.Array) -> jax.Array:
    """Float32 sum over k of values [n, k] times w_dec[indices] [n, k, d]."""
    return jnp.einsum("na,nad->nd", values.astype(jnp.float32), _rows(w_dec, indices), precision="highest")


def gather_dot(rows: jax.Array, indices: jax.Array, w: jax.Array) -> jax.Array:
    """Float32 products [n, k] of rows [n, d] with w[indices] [n, k, d]."""
    return jnp.einsum("nd,nad->na", rows.astype(jnp.float32), _rows(w, indices), precision="highest")


def _rows(w: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take(w, indices, axis=0, mode="clip").astype(jnp.float32)
