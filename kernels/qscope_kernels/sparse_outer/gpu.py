"""Hopper: the slots sorted by latent, then one warpgroup per latent (and per some columns) adds the rows of its run.

A latent may be active everywhere, so runs are cut at multiples of `piece` entries: first a block of its own sums every
piece that lies within one run, then each latent adds the entries at its ends and the sums of the pieces between.
The order of additions follows from the indices alone: no atomics, the same bits every time.
"""

import jax
import jax.numpy as jnp

from qscope_kernels.dispatch import Device
from qscope_kernels.gpu_rows import add_rows, divide, in_parts, nothing, unsuited_rows
from qscope_kernels.pallas_gpu import call, not_hopper, pl, strided
from qscope_kernels.sparse_outer.order import order

# 2 KiB of each row at a time, all tokens' before the next 2 KiB: 8192 tokens' fit a third of the level 2 cache.
ROW_BYTES, PIECE, UNROLL = 2048, 128, 8


def sparse_outer(
    values: jax.Array,
    indices: jax.Array,
    rows: jax.Array,
    *,
    latents: int,
    row_bytes: int = ROW_BYTES,
    piece: int = PIECE,
    unroll: int = UNROLL,
) -> tuple[jax.Array, jax.Array]:
    """Per latent, float32 sums of values [n, k] times rows [n, d] over the slots that name it [f, d], of values [f]."""
    ordered = order(indices, latents)
    weights = values.reshape(-1).astype(jnp.float32)[ordered.slots]
    entries = weights, ordered.slots // indices.shape[1], in_parts(rows, row_bytes // rows.dtype.itemsize)
    pieces = sum_pieces(ordered.latents, *entries, piece=piece, unroll=unroll)
    sums, totals = sum_runs(ordered.starts, *entries, *pieces, piece=piece, unroll=unroll)
    return sums.reshape(latents, -1), totals


def sum_pieces(latents, weights, tokens, rows, *, piece: int, unroll: int) -> list[jax.Array]:
    """Sums of pieces within one run [parts, m / piece, columns], of their weights [m / piece]; of others garbage."""
    pieces, (_, parts, columns) = latents.shape[0] // piece, rows.shape
    layout = strided(columns, rows.dtype)
    out = [((parts, max(pieces, 1), columns), jnp.float32), ((max(pieces, 1),), jnp.float32)]
    if not pieces:
        return [jnp.zeros(*one) for one in out]

    def body(latents, weights, tokens, rows, sums, totals):
        part, at = divide(jax.lax.axis_index("block"), pieces)
        start = at * piece

        @pl.when(latents[start] == latents[start + piece - 1])
        def _():
            entry = lambda e: (tokens[e], weights[e], weights[e])  # noqa: E731
            row = lambda token: rows.at[token, part]  # noqa: E731
            total = nothing(columns, layout)
            total = add_rows(total, row, entry, start, start + piece, layout=layout, unroll=unroll)
            sums[part, at] = total[0]

            @pl.when(part == 0)
            def _():
                totals[at] = total[1]

    return call(body, latents, weights, tokens, rows, out=out, blocks=pieces * parts)


def sum_runs(starts, weights, tokens, rows, sums, totals, *, piece: int, unroll: int) -> list[jax.Array]:
    """Sums of the runs [f, parts, columns] and of their weights [f], from their ends and the sums of their pieces."""
    latents, (_, parts, columns) = starts.shape[0] - 1, rows.shape
    layout = strided(columns, rows.dtype)

    def body(starts, weights, tokens, rows, sums, totals, out, amounts):
        part, latent = divide(jax.lax.axis_index("block"), latents)
        start, stop = starts[latent], starts[latent + 1]
        first = divide(start + piece - 1, piece)[0]
        inner = jnp.maximum(divide(stop, piece)[0] - first, 0)  # pieces first .. first + inner - 1 lie within this run

        def end(e):
            e = start + jnp.where(start + e < first * piece, e, e + inner * piece)
            return tokens[e], weights[e], weights[e]

        def whole(e):
            return first + e, 1.0, totals[first + e]

        total = nothing(columns, layout)
        ends = stop - start - inner * piece
        total = add_rows(total, lambda at: rows.at[at, part], end, 0, ends, layout=layout, unroll=unroll)
        total = add_rows(
            total, lambda at: sums.at[part, at], whole, 0, inner, layout=layout, unroll=max(1, unroll // 2)
        )
        out[latent, part] = total[0]

        @pl.when(part == 0)
        def _():
            amounts[latent] = total[1]

    out = [((latents, parts, columns), jnp.float32), ((latents,), jnp.float32)]
    return call(body, starts, weights, tokens, rows, sums, totals, out=out, blocks=latents * parts)


def unsuited(device: Device, values: jax.Array, indices: jax.Array, rows: jax.Array, *, latents: int) -> str | None:
    """Why `sparse_outer` cannot serve this, or None."""
    if values.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"values of {values.dtype}"
    if latents * rows.shape[1] >= 2**31 or latents < 1:
        return f"a gradient [{latents}, {rows.shape[1]}] has no element or more than 31 bits count"
    if indices.size // PIECE * rows.shape[1] >= 2**31:
        return f"sums of the pieces of {indices.size} slots have more elements than 31 bits count"
    return not_hopper(device) or unsuited_rows(rows.shape, rows.dtype, indices, 2**30)
