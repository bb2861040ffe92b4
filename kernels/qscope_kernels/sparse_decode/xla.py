"""The portable form: one slot at a time, so that no [n, k, d] array exists."""

import functools

import jax
import jax.numpy as jnp


def sparse_decode(values: jax.Array, indices: jax.Array, w_dec: jax.Array) -> jax.Array:
    """Float32 sum over the slots of values [n, k], each adding one gathered row of w_dec [f, d] per token."""

    # Checkpointed: the backward pass gathers the rows again instead of keeping [n, k, d] of them.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_slot(total, slot):
        value, index = slot
        rows = jnp.take(w_dec, index, axis=0, mode="clip").astype(jnp.float32)
        return total + value[:, None] * rows, None

    # Like `values`: inside shard_map, what differs between devices must do so from the start.
    start = jnp.zeros_like(values, jnp.float32, shape=(values.shape[0], w_dec.shape[1]))
    total, _ = jax.lax.scan(add_slot, start, (values.T.astype(jnp.float32), indices.T))
    return total
