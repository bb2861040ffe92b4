"""A number per array that changes when its content does, however the array lies on its devices.

Every element's bits are mixed with a number drawn from its position, and all are added modulo 2^32. The mixing is a
bijection of 32 bits, so that one changed element is always noticed; of other changes one in 2^32 is not.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def checksums(arrays: Sequence[jax.Array]) -> list[int]:
    """One number below 2^32 per array, computed where the arrays lie; all processes must call it alike."""
    groups: dict[frozenset, list[int]] = {}
    for i, array in enumerate(arrays):
        groups.setdefault(frozenset(array.sharding.device_set), []).append(i)
    sums = [0] * len(arrays)
    for members in groups.values():
        for i, value in zip(members, _checksums([arrays[i] for i in members]), strict=True):
            sums[i] = int(np.asarray(value))
    return sums


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(array) for array in arrays]


def _checksum(array: jax.Array) -> jax.Array:
    bits = _bits(array)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        along = _mixed(jax.lax.iota(jnp.uint32, size) + jnp.uint32(0x9E3779B9 * (axis + 1) & 0xFFFFFFFF))
        place = place + jnp.expand_dims(along, [i for i in range(bits.ndim) if i != axis])
    return jnp.sum(_mixed(bits ^ place), dtype=jnp.uint32)


def _bits(array: jax.Array) -> jax.Array:
    """The content as uint32; an element of 64 bits becomes two."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby, public domain): a bijection in which every bit depends on all."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
