"""The slots of a code, ordered by the latent they name: a function of the indices alone, so that a compiler that meets
it twice (the gradients of both matrices of an autoencoder) sorts once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
    """Slots n * k + a in order of their latent, those of one latent in order of the slot."""

    latents: jax.Array  # [n k] int32, ascending
    slots: jax.Array  # [n k] int32
    starts: jax.Array  # [f + 1] int32: latent i has the entries starts[i] .. starts[i + 1] - 1


def order(indices: jax.Array, latents: int) -> Order:
    """Sorts the slots of indices [n, k]; an index beyond the latents counts as the nearest one."""
    keys = jnp.clip(indices, 0, latents - 1).reshape(-1).astype(jnp.int32)
    slots = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 0)
    keys, slots = jax.lax.sort((keys, slots), num_keys=1, is_stable=True)
    # Unrolled, a GPU's compiler fuses the search's twenty steps into five kernels.
    starts = jnp.searchsorted(keys, jnp.arange(latents + 1, dtype=jnp.int32), method="scan_unrolled")
    return Order(keys, slots, starts.astype(jnp.int32))
