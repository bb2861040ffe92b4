"""The definition: every row times every matrix, of which its own group's product is kept."""

import jax
import jax.numpy as jnp


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, within, precision) -> jax.Array:
    """Computes all products of x [n, d] and w [e, d, m] as [n, e, m], then picks one or, past the groups, none."""
    del within  # where w lies elsewhere changes nothing
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    member = (row >= ends - group_sizes) & (row < ends)
    every = jnp.einsum("nd,edm->nem", x, w, precision=precision, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.where(member[:, :, None], every, 0), axis=1).astype(x.dtype)
