"""Sorting networks over lists of arrays, sorted elementwise and in descending order; unrolled while tracing.

An item is a tuple (key, *payload) of arrays of one shape: the keys order, payloads travel along. Lists are Python lists
of items. What a result does not need the compiler drops: `merge(a, b)[:keep]` costs what the first `keep` items cost.
"""

import jax
import jax.numpy as jnp

Item = tuple[jax.Array, ...]


def exchange(a: Item, b: Item) -> tuple[Item, Item]:
    """The larger item and the smaller one, per element."""
    if len(a) == 1:
        return (jnp.maximum(a[0], b[0]),), (jnp.minimum(a[0], b[0]),)
    first = a[0] >= b[0]
    larger = tuple(jnp.where(first, p, q) for p, q in zip(a[1:], b[1:], strict=True))
    smaller = tuple(jnp.where(first, q, p) for p, q in zip(a[1:], b[1:], strict=True))
    return (jnp.maximum(a[0], b[0]), *larger), (jnp.minimum(a[0], b[0]), *smaller)


def sort(items: list[Item]) -> list[Item]:
    """Batcher's odd-even merge sort, for any number of items."""
    if len(items) < 2:
        return items
    half = len(items) // 2
    return merge(sort(items[:half]), sort(items[half:]))


def merge(a: list[Item], b: list[Item]) -> list[Item]:
    """Two sorted lists as one (Batcher's odd-even merge), of any lengths."""
    if not a or not b:
        return a or b
    if len(a) == len(b) == 1:
        return list(exchange(a[0], b[0]))
    even, odd = merge(a[::2], b[::2]), merge(a[1::2], b[1::2])
    merged = even[:1]
    for i, item in enumerate(odd):
        merged += exchange(item, even[i + 1]) if i + 1 < len(even) else (item,)
    return merged + even[len(odd) + 1 :]
