"""The k largest entries of every row, from a few of its entries: the maxima of groups, then the best groups whole.

Claim: the k largest entries, ties to the lowest index, all lie in the k groups of largest maximum, ties to the first
group, where groups are runs of neighbouring columns. Proof: let s be one of the k entries and G its group. A group H
that comes before G has max(H) > max(G) >= s, or max(H) = max(G) >= s and lies to the left of G; either way the entry
that attains max(H) comes before s. Distinct groups give distinct entries, and fewer than k entries come before s, so
fewer than k groups come before G. The chosen groups are read in the order of their columns, so that the last top-k,
whose ties go to the first candidate, gives them to the lowest index too. Entries below the k-th largest maximum are
not among the k largest, as k entries are not below it: hiding them from the last top-k makes that faster.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp


def select(pre: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of every row of pre [n, f] and their int32 indices, both [n, k], sorted, descending.

    Ties go to the lowest index, zeros of either sign are equal, NaN ranks above all. The gradient is that of reading
    the values at the indices. Rows that no group divides are padded, which copies them; groups divide the widths of
    all released SAEs.
    """
    n, f = pre.shape
    scores, width = jax.lax.stop_gradient(pre), group_width(f, k)
    if width == 1:
        indices = jax.lax.top_k(ordered(scores), k)[1]
        return jnp.take_along_axis(pre, indices, axis=1, mode="clip"), indices
    maxima, groups = best_groups(scores, k, width)
    groups = jnp.sort(groups, axis=1)
    candidates = ordered(members(scores, groups, width)).reshape(n, k * width)
    # Not `maxima[:, -1:]`: XLA would no longer see that a top-k was meant, and sort. NaN hides nothing.
    kth = jnp.min(maxima, axis=1, keepdims=True)
    _, slots = jax.lax.top_k(jnp.where(candidates < kth, -jnp.inf, candidates), k)
    indices = jnp.take_along_axis(groups, slots // width, axis=1, mode="clip") * width + slots % width
    return jnp.take_along_axis(pre, indices, axis=1, mode="clip"), indices


def group_width(f: int, k: int) -> int:
    """Columns per group: f / g maxima and k * g candidates are fewest at g = sqrt(f / k). 1: groups do not pay."""
    width = 1 << round(math.log2(f / k) / 2)
    return width if width >= 8 else 1


def best_groups(pre: jax.Array, k: int, width: int) -> tuple[jax.Array, jax.Array]:
    """The k groups of `width` neighbours with the largest maxima: (maxima, groups) [n, k], ties to the first group."""
    maxima = group_maxima(pre, width)
    shown = jax.lax.platform_dependent(maxima, cpu=partial(_hide, k=k), default=lambda maxima: maxima)
    maxima, groups = jax.lax.top_k(shown, k)
    return maxima, groups


def group_maxima(pre: jax.Array, width: int) -> jax.Array:
    """[n, groups]: the largest entry of each group, as `ordered`; NaN where there is one.

    Compared as integers of the same order: XLA for CPUs takes large maxima of floats with a library that skips NaNs.
    """
    x = ordered(pre)
    bits = jnp.int32 if x.dtype == jnp.float32 else jnp.int64
    largest = jnp.iinfo(bits).max

    def swapped(b):  # negative floats grow with their bits, as integers they must fall; its own inverse
        return jnp.where(b < 0, b ^ largest, b)

    keys = swapped(jax.lax.bitcast_convert_type(_runs(x, width), bits))
    return jax.lax.bitcast_convert_type(swapped(jnp.max(keys, axis=2)), x.dtype)


def _hide(x: jax.Array, *, k: int) -> jax.Array:
    """x [n, m] with -inf in the place of most entries that are none of the k largest.

    XLA's top-k for CPUs is a heap, which takes half the time where few entries enter it. At any time at least k bins
    of x, and therefore k entries, reach `low`, which is raised by bisection.
    """
    width = x.shape[1] // (4 * k)
    if width < 2:
        return x
    bins = jnp.max(_runs(x, width), axis=2)
    ends = jnp.min(bins, axis=1, keepdims=True), jnp.max(bins, axis=1, keepdims=True)
    low, *_ = jax.lax.fori_loop(0, 8, _bisect, (*ends, bins, jnp.float32(k)))
    return jnp.where(x < low, -jnp.inf, x)


def _bisect(_, state):
    """Halves the interval low..high [n, 1] such that k bins [n, m] reach low still."""
    # All in the state and nothing closed over: outside `jit` it is compiled once, not at every call.
    low, high, bins, k = state
    middle = low / 2 + high / 2
    reached = jnp.sum((bins >= middle).astype(jnp.float32), axis=1, keepdims=True) >= k
    return jnp.where(reached, middle, low), jnp.where(reached, high, middle), bins, k


def members(pre: jax.Array, groups: jax.Array, width: int) -> jax.Array:
    """[n, k, width]: the entries of groups [n, k]; -inf where the last one lacks some."""
    return jnp.take_along_axis(_runs(pre, width), groups[:, :, None], axis=1, mode="clip")


def ordered(x: jax.Array) -> jax.Array:
    """At least float32, ordered by `lax.top_k` as by value: it ranks -0 below 0, and NaNs by their sign bit."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(x == 0, 0.0, jnp.where(jnp.isnan(x), jnp.nan, x))


def _runs(pre: jax.Array, width: int) -> jax.Array:
    """[n, groups, width]; what is missing of the last group is -inf."""
    n, f = pre.shape
    return jnp.pad(pre, ((0, 0), (0, -f % width)), constant_values=-jnp.inf).reshape(n, -(-f // width), width)
