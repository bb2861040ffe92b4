"""Rows in blocks, so that what is made per row does not grow with their number."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Out = TypeVar("Out")


def map_blocks(function: Callable[..., Out], arrays: tuple[jax.Array, ...], most: int) -> Out:
    """function(*arrays), row by row independent, over even blocks of at most `most` rows (at least one).

    The last block is padded with zero rows, whose results are dropped.
    """
    n = arrays[0].shape[0]
    blocks = -(-n // max(1, most))
    if blocks <= 1:
        return function(*arrays)
    size = -(-n // blocks)  # even blocks: little padding
    spare = blocks * size - n

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, spare), *((0, 0),) * (x.ndim - 1))).reshape(blocks, size, *x.shape[1:])

    out = jax.lax.map(lambda parts: function(*parts), tuple(map(split, arrays)))
    return jax.tree.map(lambda x: x.reshape(blocks * size, *x.shape[2:])[:n], out)
