"""Hopper: one warpgroup per token (and per some columns) adds the rows it needs, float32 sums in registers.

Bound by memory: every row goes from device memory to registers once, in 16-byte pieces, several rows in flight.
"""

import jax
import jax.numpy as jnp

from qscope_kernels.dispatch import Device
from qscope_kernels.gpu_rows import add_rows, divide, in_parts, nothing, unsuited_rows
from qscope_kernels.pallas_gpu import call, load, not_hopper, strided

LONGEST_ROW = 8192  # of `gather_dot`, which keeps a token's row in the registers of one warpgroup
COLUMNS, UNROLL = 2048, 5


def sparse_decode(
    values: jax.Array, indices: jax.Array, w_dec: jax.Array, *, columns: int = COLUMNS, unroll: int = UNROLL
) -> jax.Array:
    """Float32 sum over the slots of values [n, k] times rows w_dec[indices] of w_dec [f, d]."""
    (n, k), w_dec = values.shape, in_parts(w_dec, columns)
    f, parts, columns = w_dec.shape
    layout, unroll = strided(columns, w_dec.dtype), min(unroll, k)

    def body(values, indices, w_dec, out):
        token, part = divide(jax.lax.axis_index("block"), parts)

        def entry(slot):
            return jnp.clip(indices[token, slot], 0, f - 1), values[token, slot], 0.0

        row = lambda at: w_dec.at[at, part]  # noqa: E731
        total = add_rows(nothing(columns, layout), row, entry, 0, k, layout=layout, unroll=unroll)
        out[token, part] = total[0]

    arrays = values.astype(jnp.float32), indices, w_dec
    out = call(body, *arrays, out=[((n, parts, columns), jnp.float32)], blocks=n * parts)[0]
    return out.reshape(n, parts * columns)


def gather_dot(rows: jax.Array, indices: jax.Array, w: jax.Array, *, unroll: int = UNROLL) -> jax.Array:
    """Float32 products <rows[n], w[indices[n, a]]> [n, k] of rows [n, d] and w [f, d]: the decode's gradient."""
    (n, k), (f, d) = indices.shape, w.shape
    layout, unroll = strided(d, w.dtype), min(unroll, k)

    def body(rows, indices, w, out):
        token = jax.lax.axis_index("block")
        mine = load(rows.at[token], layout).astype(jnp.float32)

        def group(first, count):
            numbers = [jnp.clip(indices[token, first + i], 0, f - 1) for i in range(count)]
            # All loads come before the first sum: a sum over threads waits, and loads do not pass a barrier.
            vectors = [load(w.at[number], layout) for number in numbers]
            for i, vector in enumerate(vectors):
                out[token, first + i] = jnp.sum(mine * vector.astype(jnp.float32))

        jax.lax.fori_loop(0, k // unroll, lambda step, _: group(step * unroll, unroll), None)
        if k % unroll:
            group(k - k % unroll, k % unroll)

    return call(body, rows, indices, w, out=[((n, k), jnp.float32)], blocks=n)[0]


def unsuited(device: Device, values: jax.Array, indices: jax.Array, w_dec: jax.Array) -> str | None:
    """Why `sparse_decode` cannot serve this, or None; also for `gather_dot`, with the token's rows as `values`."""
    if values.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"values of {values.dtype}"
    n, d = indices.shape[0], w_dec.shape[1]
    if n * d >= 2**31:
        return f"vectors [{n}, {d}] have more elements than 31 bits count"
    return not_hopper(device) or unsuited_rows(w_dec.shape, w_dec.dtype, indices, LONGEST_ROW)
