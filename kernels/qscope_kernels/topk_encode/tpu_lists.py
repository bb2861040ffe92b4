"""The matmul of the TPU encode, which keeps the largest pre-activations of every bin on the way and stores no others.

Column c lies in bin c % bins and in chunk c // bins. Per bin and row a sorted list of `keep` values lives in VMEM while
a row block meets all tiles of w_enc. A tile's values enter the lists while the next tile is multiplied, so that the
vector unit works beside the matrix unit: hence the carry from one grid step to the next.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qscope_kernels.pallas_tpu import call, pl, pltpu
from qscope_kernels.topk_encode.tpu_networks import merge_largest, sort
from qscope_kernels.topk_encode.tpu_plan import LANES, Plan

_SLAB = 64  # rows inserted at once: how the program is written, not how it is scheduled


def chunk_bits(latents: int, bins: int) -> int:
    """Low mantissa bits that hold a chunk's number."""
    return max(1, (-(-latents // bins) - 1).bit_length())


def bin_lists(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, plan: Plan, exact: bool, vmem: int, interpret: Any = None
) -> list[jax.Array]:
    """Per bin the `keep` largest of max(x @ w_enc + b_enc, 0), sorted, and what tells whether a row is finite.

    Returns [keep + 1, n, bins] float32, of which the last plane is a sum of all of the bin's pre-activations: NaN or
    infinite where one of them is. "exact": values, and their chunks [keep, n, bins] int32. Else one array of keys: the
    value with its last `chunk_bits` bits replaced by the chunk. Rows that are not finite hold anything.
    """
    (n, d), f = x.shape, w_enc.shape[1]
    rows = plan.rows
    lists = lambda planes: pl.BlockSpec((planes, rows, plan.bins), lambda i, j: (0, i, 0))  # noqa: E731
    out = [((plan.keep + 1, n, plan.bins), jnp.float32)]
    specs = [lists(plan.keep + 1)]
    if exact:
        out.append(((plan.keep, n, plan.bins), jnp.int32))
        specs.append(lists(plan.keep))
    return call(
        partial(_body, plan=plan, latents=f, exact=exact),
        x,
        w_enc,
        b_enc.astype(jnp.float32)[None],
        out=out,
        out_specs=specs,
        grid=(-(-n // rows), -(-f // plan.columns)),
        in_specs=[
            pl.BlockSpec((rows, d), lambda i, j: (i, 0)),
            pl.BlockSpec((d, plan.columns), lambda i, j: (0, j)),
            pl.BlockSpec((1, plan.columns), lambda i, j: (0, j)),
        ],
        scratch_shapes=[pltpu.VMEM((rows // plan.parts, plan.columns), jnp.float32)] * plan.parts,
        semantics=("parallel", "arbitrary"),
        vmem=vmem,
        interpret=interpret,
        name=f"topk_encode_{'exact' if exact else 'fast'}",
    )


def split_key(keys: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The value that each key stands for, the middle of those that share it, and its chunk; 0 stands for 0."""
    pattern = jax.lax.bitcast_convert_type(keys, jnp.int32)
    chunk, head = pattern & (1 << bits) - 1, pattern & -(1 << bits)
    middle = jnp.where(head > 0, head | 1 << bits - 1, 0)
    return jax.lax.bitcast_convert_type(middle, jnp.float32), chunk


def _body(x_ref, w_ref, b_ref, *refs, plan: Plan, latents: int, exact: bool) -> None:
    """One tile: multiplies its parts, and inserts the part before each."""
    lists, products = refs[: 1 + exact], refs[1 + exact :]
    step, steps = pl.program_id(1), pl.num_programs(1)
    rows = plan.rows // plan.parts
    chunks = plan.columns // plan.bins

    @pl.when(step == 0)
    def _():
        for ref in lists:
            ref[...] = jnp.zeros_like(ref)
        products[-1][...] = jnp.full_like(products[-1], -1.0)  # enters no list

    def insert(part, first_chunk):
        _insert(products[part], lists, part * rows, first_chunk, plan, chunk_bits(latents, plan.bins))

    for part in range(plan.parts):
        before = (part - 1) % plan.parts
        # What is carried over at the first step is nobody's: any chunk will do, but not a negative one.
        insert(before, jnp.maximum(step - (part == 0), 0) * chunks)
        tile = _multiply(x_ref[part * rows : (part + 1) * rows, :], w_ref[...]) + b_ref[...]
        if latents % plan.columns:
            column = step * plan.columns + jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1)
            tile = jnp.where(column < latents, tile, -1.0)  # reads beyond the array give anything
        products[part][...] = tile

    @pl.when(step == steps - 1)
    def _():
        insert(plan.parts - 1, step * chunks)


def _multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, w.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(x.astype(dtype), w.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _insert(product, lists, first_row: int, first_chunk: Any, plan: Plan, bits: int) -> None:
    """Merges a product [rows, columns] into the lists of its rows."""
    chunks, rows = plan.columns // plan.bins, product.shape[0]
    for row in range(0, rows, _SLAB):
        size = min(_SLAB, rows - row)
        source, target = pl.ds(row, size), pl.ds(first_row + row, size)
        for lane in range(0, plan.bins, LANES):
            held = pl.ds(lane, LANES)
            kept = [tuple(ref[i, target, held] for ref in lists) for i in range(plan.keep)]
            total, fresh = lists[0][plan.keep, target, held], []
            for chunk in range(chunks):
                value = product[source, pl.ds(chunk * plan.bins + lane, LANES)]
                total += value
                fresh.append(_item(value, first_chunk + chunk, bits, exact=len(lists) == 2))
            for start in range(0, chunks, plan.keep):
                kept = merge_largest(kept, sort(fresh[start : start + plan.keep]), plan.keep)
            for i, item in enumerate(kept):
                for ref, part in zip(lists, item, strict=True):
                    ref[i, target, held] = part
            lists[0][plan.keep, target, held] = total


def _item(value: jax.Array, chunk: Any, bits: int, *, exact: bool) -> tuple[jax.Array, ...]:
    if exact:
        return value, jnp.full(value.shape, chunk, jnp.int32)
    pattern = jax.lax.bitcast_convert_type(value, jnp.int32)
    return (jax.lax.bitcast_convert_type(pattern & -(1 << bits) | chunk, jnp.float32),)
