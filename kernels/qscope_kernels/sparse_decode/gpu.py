"""Hopper: one warpgroup per token adds the rows it needs, several in flight, float32 sums in registers.

Bound by memory: every row goes from device memory to registers once, in 16-byte pieces, and nowhere else.
"""

import jax
import jax.numpy as jnp

from qscope_kernels.dispatch import Device
from qscope_kernels.pallas_gpu import WARPGROUP, call, load, not_hopper, strided
from qscope_kernels.sparse_decode.rows import add_rows, nothing

LONGEST_ROW = 8192  # float32 sums of a longer one do not fit the registers of one warpgroup
UNROLL = 5


def sparse_decode(values: jax.Array, indices: jax.Array, w_dec: jax.Array, *, unroll: int = UNROLL) -> jax.Array:
    """Float32 sum over the slots of values [n, k] times rows w_dec[indices] of w_dec [f, d]."""
    (n, k), (f, d) = values.shape, w_dec.shape
    layout = strided(d, w_dec.dtype)

    def body(values, indices, w_dec, out):
        token = jax.lax.axis_index("block")

        def entry(slot):
            return jnp.clip(indices[token, slot], 0, f - 1), values[token, slot]

        total = add_rows(nothing(d, layout), lambda r: w_dec.at[r], entry, 0, k, layout=layout, unroll=min(unroll, k))
        out[token] = total[0]

    return call(body, values.astype(jnp.float32), indices, w_dec, out=[((n, d), jnp.float32)], blocks=n)[0]


def gather_dot(rows: jax.Array, indices: jax.Array, w: jax.Array, *, unroll: int = UNROLL) -> jax.Array:
    """Float32 products <rows[n], w[indices[n, a]]> [n, k] of rows [n, d] and w [f, d]: the decode's gradient."""
    (n, k), (f, d) = indices.shape, w.shape
    layout, unroll = strided(d, w.dtype), min(unroll, k)

    def body(rows, indices, w, out):
        token = jax.lax.axis_index("block")
        mine = load(rows.at[token], layout).astype(jnp.float32)

        def group(first, count):
            slots = [first + i for i in range(count)]
            numbers = [jnp.clip(indices[token, slot], 0, f - 1) for slot in slots]
            # All loads come before the first sum: a sum over threads waits, and loads do not pass a barrier.
            vectors = [load(w.at[number], layout) for number in numbers]
            for slot, vector in zip(slots, vectors, strict=True):
                out[token, slot] = jnp.sum(mine * vector.astype(jnp.float32))

        def step(i, _):
            group(i * unroll, unroll)

        jax.lax.fori_loop(0, k // unroll, step, None)
        if k % unroll:
            group(k - k % unroll, k % unroll)

    return call(body, rows, indices, w, out=[((n, k), jnp.float32)], blocks=n)[0]


def unsuited(device: Device, values: jax.Array, indices: jax.Array, w_dec: jax.Array) -> str | None:
    """Why `sparse_decode` cannot serve this, or None; the same for `gather_dot`, whose rows are as long."""
    return not_hopper(device) or unsuited_rows(w_dec.shape, w_dec.dtype, indices)


def unsuited_rows(shape: tuple[int, ...], dtype, indices: jax.Array) -> str | None:
    """Why rows of a matrix [f, d] of this type cannot be gathered by these indices, or None."""
    if shape[1] % WARPGROUP or not 0 < shape[1] <= LONGEST_ROW:
        return f"d = {shape[1]} is no multiple of {WARPGROUP} up to {LONGEST_ROW}"
    if shape[0] * shape[1] >= 2**31:
        return f"a matrix {list(shape)} has more elements than 32 bits count"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"rows of {dtype}"
    if indices.dtype != jnp.int32 or 0 in indices.shape:
        return f"indices {indices.dtype}{list(indices.shape)}"
    return None
