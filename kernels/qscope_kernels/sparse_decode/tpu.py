"""TPU: every row is read once, by DMA, and added as whole vector registers; nothing else is read but the codes.

Bound by memory. A gather of each slot's rows [n, d], as the portable form has it, also reads and writes the sum [n, d]
for each slot.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qscope_kernels.dispatch import Device
from qscope_kernels.pallas_tpu import LANES, SUBLANES, not_tpu, pl, pltpu, vmem_bytes
from qscope_kernels.sparse_decode.tpu_rows import (
    TOKENS,
    Use,
    as_tiles,
    at_token,
    needed_bytes,
    over_rows,
    pad_tokens,
    tiled_block,
)

MOST_SLOTS = 256  # beyond, the unrolled loops are long to compile and codes fill the scalar memory


# Compiled once outside `jit` too, not at every call.
@partial(jax.jit, static_argnames="interpret")
def sparse_decode(values: jax.Array, indices: jax.Array, w_dec: jax.Array, *, interpret: Any = None) -> jax.Array:
    """Float32 sum over the slots of values [n, k] times rows w_dec[indices] of w_dec [f, d]."""
    (n, k), d = values.shape, w_dec.shape[1]

    def use(values, out, token):
        def finish(total):
            out[at_token(token)] = total

        add = lambda slot, total, row: total + values[token, slot] * row  # noqa: E731
        return Use(jnp.zeros((d // LANES, LANES), jnp.float32), add, finish)

    block = pl.BlockSpec((TOKENS, k), lambda step: (step, 0), memory_space=pltpu.SMEM)
    shape = (pl.cdiv(n, SUBLANES), d // LANES, SUBLANES, LANES)
    values = pad_tokens(values.astype(jnp.float32))
    out = over_rows(use, indices, w_dec, (values, block), (shape, tiled_block(d)), "sparse_decode", interpret)
    return out.swapaxes(1, 2).reshape(-1, d)[:n]


@partial(jax.jit, static_argnames="interpret")
def gather_dot(rows: jax.Array, indices: jax.Array, w: jax.Array, *, interpret: Any = None) -> jax.Array:
    """Float32 products <rows[n], w[indices[n, a]]> [n, k] of rows [n, d] and w [f, d]: the decode's gradient."""
    (n, k), d = indices.shape, w.shape[1]

    def use(rows, out, token):
        mine = rows[at_token(token)]

        def add(slot, sums, row):
            return [*sums, jnp.sum(mine * row, axis=0, keepdims=True)]

        def finish(sums):
            out[pl.ds(token, 1), :] = _lane_sums(jnp.concatenate(sums))

        return Use([], add, finish)

    rows = as_tiles(jnp.pad(rows.astype(jnp.float32), ((0, -n % SUBLANES), (0, 0))))
    out = (n, k), pl.BlockSpec((TOKENS, k), lambda step: (step, 0))
    return over_rows(use, indices, w, (rows, tiled_block(d)), out, "gather_dot", interpret)


def _lane_sums(rows: jax.Array) -> jax.Array:
    """The sums [1, k] of rows [k, 128]: what comes out below one another is turned by a diagonal mask."""
    k = rows.shape[0]
    diagonal = jax.lax.broadcasted_iota(jnp.int32, (k, k), 0) == jax.lax.broadcasted_iota(jnp.int32, (k, k), 1)
    return jnp.sum(jnp.where(diagonal, jnp.sum(rows, axis=1, keepdims=True), 0.0), axis=0, keepdims=True)


def unsuited(device: Device, values: jax.Array, indices: jax.Array, w_dec: jax.Array) -> str | None:
    """Why neither `sparse_decode` nor `gather_dot` (whose rows [n, d] take the place of values) can serve this."""
    (n, k), (f, d) = indices.shape, w_dec.shape
    if (why := not_tpu(device)) is not None:
        return why
    if w_dec.dtype not in (jnp.float32, jnp.bfloat16) or indices.dtype != jnp.int32:
        return f"a weight of {w_dec.dtype} and indices of {indices.dtype}, not float32 or bfloat16 and int32"
    if not n or not f or f % SUBLANES or not d or d % LANES:
        return f"n = {n}, f = {f}, d = {d}: empty, f no multiple of {SUBLANES} or d none of {LANES}"
    if not 0 < k <= MOST_SLOTS or needed_bytes(k, d) > vmem_bytes(device) // 2:
        return f"k = {k} rows of d = {d}: more than {MOST_SLOTS}, or too many for the vector memory"
    return None
