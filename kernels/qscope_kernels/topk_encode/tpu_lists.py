"""The matmul of the TPU encode, which keeps the largest pre-activations of every bin on the way and stores no others.

Column c lies in bin c % bins and in chunk c // bins. Per bin and row a sorted list of `keep` values lives in VMEM while
a row block meets all tiles of w_enc. A tile's values enter the lists while the next tile is multiplied, so that the
vector unit works beside the matrix unit: hence the carry from one grid step to the next.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qscope_kernels.pallas_tpu import LANES, call, pl, pltpu
from qscope_kernels.topk_encode.tpu_networks import merge, sort
from qscope_kernels.topk_encode.tpu_plan import Plan

# Larger pre-activations, and NaN, are told from the rest and left to the fallback.
HUGE = 2.0**127
_SLAB = 64  # rows inserted at once: how the program is written, not how it is scheduled


def chunk_bits(latents: int, bins: int) -> int:
    """Low mantissa bits that hold a chunk's number."""
    return max(1, (-(-latents // bins) - 1).bit_length())


def bin_lists(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, plan: Plan, exact: bool, vmem: int, interpret: Any = None
) -> list[jax.Array]:
    """Per bin the `keep` largest of max(x @ w_enc + b_enc, 0), sorted.

    Returns "exact" values [keep, n, bins] float32 and their chunks, int32; else one array of keys: the value with its
    last `chunk_bits` bits replaced by the chunk. NaN, and what is no less than HUGE, count as HUGE.
    """
    (n, d), f = x.shape, w_enc.shape[1]
    rows, steps = plan.rows, -(-f // plan.columns)
    # Latents that only fill up a tile enter no list.
    bias = jnp.pad(b_enc.astype(jnp.float32), (0, steps * plan.columns - f), constant_values=-1.0)[None]
    lists = lambda planes: pl.BlockSpec((planes, rows, plan.bins), lambda i, j: (0, i, 0))  # noqa: E731
    out = [((plan.keep, n, plan.bins), jnp.float32)]
    specs = [lists(plan.keep)]
    if exact:
        out.append(((plan.keep, n, plan.bins), jnp.int32))
        specs.append(lists(plan.keep))
    return call(
        partial(_body, plan=plan, latents=f, exact=exact),
        x,
        w_enc,
        bias,
        bias,
        out=out,
        out_specs=specs,
        grid=(-(-n // rows), steps),
        in_specs=[
            pl.BlockSpec((rows, d), lambda i, j: (i, 0)),
            pl.BlockSpec((d, plan.columns), lambda i, j: (0, j)),
            pl.BlockSpec((1, plan.columns), lambda i, j: (0, j)),
            pl.BlockSpec((1, plan.columns), lambda i, j: (0, jnp.maximum(j - 1, 0))),
        ],
        scratch_shapes=[pltpu.VMEM((rows, plan.columns // plan.parts), jnp.float32)] * plan.parts,
        semantics=("parallel", "arbitrary"),
        vmem=vmem,
        interpret=interpret,
        name=f"topk_encode_{'exact' if exact else 'fast'}",
    )


def dense(x: jax.Array, w_enc: jax.Array, *, plan: Plan, vmem: int, interpret: Any = None) -> jax.Array:
    """x @ w_enc [rows, f] in float32, of few rows; XLA's own would have w_enc laid out anew, in every call (TPU7x)."""

    def body(x_ref, w_ref, out_ref):
        for part in range(plan.parts):  # as in the lists, so that it takes no more memory than they do
            columns = pl.ds(part * width, width)
            out_ref[:, columns] = _multiply(x_ref[...], w_ref[:, columns])

    (rows, d), f, width = x.shape, w_enc.shape[1], plan.columns // plan.parts
    (product,) = call(
        body,
        x,
        w_enc,
        out=[((rows, f), jnp.float32)],
        out_specs=[pl.BlockSpec((rows, plan.columns), lambda j: (0, j))],
        grid=(-(-f // plan.columns),),
        in_specs=[pl.BlockSpec((rows, d), lambda j: (0, 0)), pl.BlockSpec((d, plan.columns), lambda j: (0, j))],
        semantics=("parallel",),
        vmem=vmem,
        interpret=interpret,
        name="topk_dense",
    )
    return product


def split_key(keys: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The value that each key stands for, the middle of those that share it, and its chunk; 0 stands for 0."""
    pattern = jax.lax.bitcast_convert_type(keys, jnp.int32)
    chunk, head = pattern & (1 << bits) - 1, pattern & -(1 << bits)
    middle = jnp.where(head > 0, head | 1 << bits - 1, 0)
    return jax.lax.bitcast_convert_type(middle, jnp.float32), chunk


def _body(x_ref, w_ref, b_ref, b_before_ref, *refs, plan: Plan, latents: int, exact: bool) -> None:
    """One tile: multiplies its parts, and inserts the part before each."""
    lists, products = refs[: 1 + exact], refs[1 + exact :]
    step, steps = pl.program_id(1), pl.num_programs(1)
    width = plan.columns // plan.parts
    bits, chunks = chunk_bits(latents, plan.bins), width // plan.bins

    @pl.when(step == 0)
    def _():
        for ref in lists:
            ref[...] = jnp.zeros_like(ref)
        products[-1][...] = jnp.full_like(products[-1], -jnp.inf)  # enters no list

    for part in range(plan.parts):
        here = step * plan.parts + part
        # What is carried over at the first step is nobody's: any chunk will do, but not a negative one.
        bias = b_ref[:, pl.ds((part - 1) * width, width)] if part else b_before_ref[:, -width:]
        _insert(products[part - 1], bias, lists, jnp.maximum(here - 1, 0) * chunks, plan, bits)
        columns = pl.ds(part * width, width)
        product = _multiply(x_ref[...], w_ref[:, columns])
        if latents % plan.columns:
            column = here * width + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
            product = jnp.where(column < latents, product, 0.0)  # reads beyond the array give anything
        products[part][...] = product

    @pl.when(step == steps - 1)
    def _():
        _insert(products[-1], b_ref[:, -width:], lists, (steps * plan.parts - 1) * chunks, plan, bits)


def _multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, w.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(x.astype(dtype), w.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _insert(product, bias: jax.Array, lists, first_chunk: Any, plan: Plan, bits: int) -> None:
    """Merges a product [rows, width], the bias added, into the lists of its rows."""
    rows, chunks = product.shape[0], product.shape[1] // plan.bins
    for row in range(0, rows, _SLAB):
        size = min(_SLAB, rows - row)
        held_rows = pl.ds(row, size)
        for lane in range(0, plan.bins, LANES):
            held = pl.ds(lane, LANES)
            kept = [tuple(ref[i, held_rows, held] for ref in lists) for i in range(plan.keep)]
            fresh = []
            for chunk in range(chunks):
                first = chunk * plan.bins + lane
                value = product[held_rows, pl.ds(first, LANES)] + bias[:, first : first + LANES]
                # The comparison is false for NaN, of either sign.
                value = jnp.where(value < HUGE, jnp.maximum(value, 0.0), HUGE)
                fresh.append(_item(value, first_chunk + chunk, bits, exact=len(lists) == 2))
            for start in range(0, chunks, plan.keep):
                kept = merge(kept, sort(fresh[start : start + plan.keep]))[: plan.keep]
            for i, item in enumerate(kept):
                for ref, part in zip(lists, item, strict=True):
                    ref[i, held_rows, held] = part


def _item(value: jax.Array, chunk: Any, bits: int, *, exact: bool) -> tuple[jax.Array, ...]:
    if exact:
        return value, jnp.full(value.shape, chunk, jnp.int32)
    pattern = jax.lax.bitcast_convert_type(value, jnp.int32)
    return (jax.lax.bitcast_convert_type(pattern & -(1 << bits) | chunk, jnp.float32),)
