"""The portable form: a few slots at a time, so that no [n, k, d] array exists.

The gathers of a group stand in one expression, which compilers fuse into one pass over the sums; from about a dozen
gathers on, XLA for CUDA stops fusing them and stores every one.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

_SLOTS = 10  # per group
_LANES = 64

Carry = TypeVar("Carry")


def sparse_decode(values: jax.Array, indices: jax.Array, w_dec: jax.Array) -> jax.Array:
    """Float32 sum over the slots of values [n, k], each adding one gathered row of w_dec [f, d] per token."""

    def add(total, slots):
        for value, index in zip(*slots, strict=True):
            total = total + value[:, None] * _rows(w_dec, index)
        return total, ()

    # Like `values`: inside shard_map, what differs between devices must do so from the start.
    start = jnp.zeros_like(values, jnp.float32, shape=(values.shape[0], w_dec.shape[1]))
    return _each_group(add, start, values.T.astype(jnp.float32), indices.T)[0]


def gather_dot(rows: jax.Array, indices: jax.Array, w: jax.Array) -> jax.Array:
    """Float32 products [n, k] of rows [n, d] with the rows of w [f, d] that indices [n, k] name."""
    rows = rows.astype(jnp.float32)

    def products(_, slots):
        return (), jnp.stack([_sum_last(rows * _rows(w, index)) for index in slots[0]])

    return _each_group(products, (), indices.T)[1].T


def _rows(w: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(w, index, axis=0, mode="clip").astype(jnp.float32)


def _sum_last(x: jax.Array) -> jax.Array:
    """Over the last axis, in lanes first: a compiler that must keep the order of additions can then use vectors."""
    if x.shape[-1] % _LANES == 0:
        x = jnp.sum(x.reshape(*x.shape[:-1], -1, _LANES), axis=-2)
    return jnp.sum(x, axis=-1)


def _each_group(body: Callable[..., tuple[Carry, jax.Array]], carry: Carry, *slots: jax.Array):
    """Folds `body` over arrays [k, n], a group of slots at a time; what does not fill a group comes first.

    Returns the last carry and the outputs [slots of the group, n] side by side, [k, n].
    """
    k, n = slots[0].shape
    groups, rest = divmod(k, _SLOTS)
    outputs = []
    if rest:
        carry, out = body(carry, tuple(part[:rest] for part in slots))
        outputs.append(out)
    if groups:
        carry, out = jax.lax.scan(body, carry, tuple(part[rest:].reshape(groups, _SLOTS, n) for part in slots))
        outputs.append(jax.tree.map(lambda parts: parts.reshape(k - rest, n), out))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
