"""Arrays inside `shard_map`: which mesh axes they vary along, as custom gradients and Pallas calls must be told."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes along which any of the arrays differs between devices; none outside `shard_map`."""
    return frozenset[str]().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays, all varying along the axes that any varies along; the transpose of this cast sums gradients there."""
    axes = varying_axes(*arrays)
    return [jax.lax.pcast(array, tuple(axes - varying_axes(array)), to="varying") for array in arrays]


def own_latents(indices: jax.Array, count: int, axis: str) -> tuple[jax.Array, jax.Array]:
    """For indices into all latents: the index within its shard of `count` latents, and whether that is this shard.

    The others keep their spread over the latents: where they are given the value 0, no latent gets them all.
    """
    return jnp.mod(indices, count), jnp.floor_divide(indices, count) == jax.lax.axis_index(axis)
