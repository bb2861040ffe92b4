"""The definition: gather all k rows of every token, then weigh and add them."""

import jax
import jax.numpy as jnp


def sparse_decode(values: jax.Array, indices: jax.Array, w_dec: jax.Array) -> jax.Array:
    """Float32 sum over k of values [n, k] times w_dec[indices] [n, k, d]."""
    rows = jnp.take(w_dec, indices, axis=0, mode="clip").astype(jnp.float32)
    return jnp.einsum("na,nad->nd", values.astype(jnp.float32), rows, precision="highest")
