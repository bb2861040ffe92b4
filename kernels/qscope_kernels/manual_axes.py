"""Arrays inside `shard_map`: which mesh axes they vary along, as custom gradients and Pallas calls must be told."""

from collections.abc import Sequence

import jax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes along which any of the arrays differs between devices; none outside `shard_map`."""
    return frozenset[str]().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays, all varying along the axes that any varies along; the transpose of this cast sums gradients there."""
    axes = varying_axes(*arrays)
    return [jax.lax.pcast(array, tuple(axes - varying_axes(array)), to="varying") for array in arrays]
