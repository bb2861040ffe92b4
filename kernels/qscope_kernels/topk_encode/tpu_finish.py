"""The small top-k of the TPU encode: from sorted lists, one per bin, to the k largest of a row, and the certificate.

Rows lie along lanes and bins along sublanes, so that merging two bins' lists takes no shuffles until eight lists of 128
rows are left; then halves of the sublanes meet, and what they free is filled with other rows. Lists grow only as far as
a row's k largest are likely to reach; the last value that a shortened list keeps joins the certificate's bound.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qscope_kernels.pallas_tpu import LANES, SUBLANES, call, pl, pltpu
from qscope_kernels.topk_encode.tpu_networks import Item, merge
from qscope_kernels.topk_encode.tpu_plan import Plan, columns_of

# A list with the bound on all that was dropped on the way to it.
Bounded = tuple[list[Item], jax.Array]
_ROWS = LANES * SUBLANES


class Level(NamedTuple):
    """The lists after so many merges: their length, and whether they leave out columns that they stand for."""

    length: int
    drops: bool


def largest(
    lists: list[jax.Array], *, latents: int, k: int, plan: Plan, vmem: int, interpret: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of lists [keep, n, bins] (keys, and chunks if exact) the k largest keys of each row, sorted [n, k].

    Returns them, what tells where each lay [n, k] (its bin, or with chunks its column) and a bound [n]: no key of the
    row that was dropped anywhere, bins included, exceeds it.
    """
    n, lengths = lists[0].shape[1], plan.lengths(latents, k)
    blocks, last = -(-n // _ROWS), -(-n // LANES) - 1
    rows = blocks * SUBLANES
    read = pl.BlockSpec((plan.keep, LANES, plan.bins), lambda i, j: (0, jnp.minimum(i * SUBLANES + j, last), 0))
    keys, places, bound = call(
        partial(_body, k=k, bins=plan.bins, levels=_levels(latents, k, plan)),
        *lists,
        out=[((k, rows, LANES), jnp.float32), ((k, rows, LANES), jnp.int32), ((rows, LANES), jnp.float32)],
        out_specs=[pl.BlockSpec((k, SUBLANES, LANES), lambda i, j: (0, i, 0))] * 2
        + [pl.BlockSpec((SUBLANES, LANES), lambda i, j: (i, 0))],
        grid=(blocks, SUBLANES),
        in_specs=[read] * len(lists),
        scratch_shapes=[
            pltpu.VMEM((lengths[-4], SUBLANES, _ROWS), jnp.float32),
            pltpu.VMEM((lengths[-4], SUBLANES, _ROWS), jnp.int32),
            pltpu.VMEM((SUBLANES, _ROWS), jnp.float32),
        ],
        semantics=("parallel", "arbitrary"),
        vmem=vmem,
        interpret=interpret,
        name="topk_finish",
    )
    flat = lambda a: a.reshape(k, -1)[:, :n].T  # noqa: E731
    return flat(keys), flat(places), bound.reshape(-1)[:n]


def _levels(latents: int, k: int, plan: Plan) -> list[Level]:
    lengths = plan.lengths(latents, k)
    return [Level(length, length < columns_of(latents, plan.bins, 1 << i)) for i, length in enumerate(lengths)]


def _body(*refs, k: int, bins: int, levels: list[Level]) -> None:
    """128 rows: merges all bins into eight lists; after eight such steps, those of 1024 rows into one."""
    inputs, (keys_ref, places_ref, bound_ref, held_keys, held_places, held_bound) = refs[:-6], refs[-6:]
    step = pl.program_id(1)
    lanes = pl.ds(step * LANES, LANES)
    merged, bound = _merge_bins([[ref[i].T for i in range(levels[0].length)] for ref in inputs], bins, levels)
    for i, (key, place) in enumerate(merged):
        held_keys[i, :, lanes] = key
        held_places[i, :, lanes] = place
    held_bound[:, lanes] = bound

    @pl.when(step == SUBLANES - 1)
    def _():
        items = [(held_keys[i], held_places[i]) for i in range(levels[-4].length)]
        items, bound = _merge_sublanes((items, held_bound[...]), levels)
        for i, (key, place) in enumerate(items[:k]):
            keys_ref[i] = key
            places_ref[i] = place
        bound_ref[...] = bound


def _merge_bins(planes: list[list[jax.Array]], bins: int, levels: list[Level]) -> Bounded:
    """planes [keep] of [bins, 128]: every eight bins are a vector of lists; pairs of vectors become one."""
    bin_of = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    groups: list[Bounded] = []
    for first in range(0, bins, SUBLANES):
        part = slice(first, first + SUBLANES)
        places = [bin_of + first] * levels[0].length
        if len(planes) == 2:
            places = [plane[part] * bins + bin_of + first for plane in planes[1]]
        items = [(plane[part], place) for plane, place in zip(planes[0], places, strict=True)]
        groups.append((items, items[-1][0] if levels[0].drops else jnp.zeros((SUBLANES, LANES), jnp.float32)))
    for level in levels[1:-3]:
        groups = [_merge(a, b, level) for a, b in zip(groups[::2], groups[1::2], strict=True)]
    (only,) = groups
    return only


def _merge(a: Bounded, b: Bounded, level: Level) -> Bounded:
    items, bound = merge(a[0], b[0])[: level.length], jnp.maximum(a[1], b[1])
    if level.drops:
        bound = jnp.maximum(bound, items[-1][0])
    return items, bound


def _merge_sublanes(lists: Bounded, levels: list[Level]) -> Bounded:
    """Eight lists in the sublanes of 1024 rows in lanes, to one: a row's place ends as sublane * 128 + lane."""
    sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, _ROWS), 0)
    for level, half in zip(levels[-3:], (4, 2, 1), strict=True):
        items, bound = lists
        first = sublane[:, : bound.shape[1] // 2] % (2 * half) < half
        pairs = [[_split(part, half, first) for part in item] for item in [*items, (bound,)]]
        a, b = ([tuple(part[side] for part in item) for item in pairs] for side in range(2))
        lists = _merge((a[:-1], a[-1][0]), (b[:-1], b[-1][0]), level)
    return lists


def _split(x: jax.Array, half: int, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the second `half` of every 2 * half sublanes, each beside those of the rows half the lanes on."""
    middle = x.shape[1] // 2
    left, right = x[:, :middle], x[:, middle:]
    first_halves = jnp.where(first, left, pltpu.roll(right, half, 0))
    return first_halves, jnp.where(first, pltpu.roll(left, SUBLANES - half, 0), right)
