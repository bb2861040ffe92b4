"""The definition: every pre-activation, sorted."""

import jax
import jax.numpy as jnp


def pre_activations(x: jax.Array, w_enc: jax.Array, b_enc: jax.Array) -> jax.Array:
    """x @ w_enc + b_enc [n, f] in float32; mixed inputs are promoted, float32 ones multiply at full precision."""
    dtype = jnp.promote_types(x.dtype, w_enc.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = jnp.einsum(
        "nd,df->nf", x.astype(dtype), w_enc.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )
    pre = product + b_enc.astype(jnp.float32)
    # Hardware makes NaNs with the sign bit set, which top_k would rank below all numbers: the fault would go unseen.
    return jnp.where(jnp.isnan(pre), jnp.nan, pre)


def topk_encode(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str = "exact"
) -> tuple[jax.Array, jax.Array]:
    """Sorts all f pre-activations of x [n, d], stably, and keeps the first k."""
    pre = pre_activations(x, w_enc, b_enc)
    indices = jnp.argsort(pre, axis=-1, descending=True, stable=True)[:, :k]
    return jax.nn.relu(jnp.take_along_axis(pre, indices, axis=-1)), indices.astype(jnp.int32)
