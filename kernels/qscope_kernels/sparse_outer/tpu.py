"""TPU: the slots sorted by latent, all tokens' rows (of some columns at a time) in vector memory, one sum at a time.

A slot costs a few cycles: it reads a row and its value, multiplies, adds to the sum of its latent, and stores the sum,
which the latent's next slot, if there is one, stores again. From far away a row is read once, not k times. The order
of additions follows from the indices alone; a latent that is active everywhere is a long run, no special case.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qscope_kernels.dispatch import Device, device_of
from qscope_kernels.pallas_tpu import LANES, SUBLANES, call, not_tpu, pl, pltpu, vmem_bytes
from qscope_kernels.sparse_outer.order import order

BLOCK = 128  # latents whose sums are written together
CHUNK = 1024  # slots that come to the scalar memory together
UNROLL = 32  # slots added without a branch
TOKEN_BITS, SLOT_BITS, LATENT_BITS = 17, 7, 7  # of the word that says what a slot is
_REGISTERS = SUBLANES * LANES  # columns that fill whole vector registers


def sparse_outer(
    values: jax.Array,
    indices: jax.Array,
    rows: jax.Array,
    *,
    latents: int,
    chunk: int = CHUNK,
    unroll: int = UNROLL,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Per latent, float32 sums of values [n, k] times rows [n, d] over the slots that name it [f, d], of values [f].

    `chunk` and `unroll` are powers of two.
    """
    (n, k), d, blocks = values.shape, rows.shape[1], pl.cdiv(latents, BLOCK)
    columns = columns_at_once(n, d, vmem_bytes(device_of(values, indices, rows)))
    ordered = order(indices, latents)
    starts = jnp.searchsorted(ordered.latents, jnp.arange(blocks + 1) * BLOCK, method="scan_unrolled")
    words = pack(ordered.slots // k, ordered.slots % k, ordered.latents % BLOCK)
    sums, totals = call(
        functools.partial(_block, unroll=unroll),
        starts.astype(jnp.int32),
        jnp.pad(words, (0, -n * k % chunk)).reshape(-1, chunk),
        jnp.pad(values.astype(jnp.float32), ((0, 0), (0, LANES - k))),
        rows.astype(jnp.float32).reshape(n, d // LANES, LANES),
        out=[(shape, jnp.float32) for shape in [(pl.cdiv(latents, 8), d // LANES, 8, LANES), (blocks, 1, BLOCK)]],
        semantics=["arbitrary", "arbitrary"],
        vmem=needed_bytes(n, columns) + (8 << 20),
        checks=False,  # of the addresses that words give
        grid_spec=_grid(n, d, blocks, columns, chunk),
        name="sparse_outer",
        interpret=interpret,
    )
    return sums.swapaxes(1, 2).reshape(-1, d)[:latents], totals.reshape(-1)[:latents]


def pack(token: jax.Array, slot: jax.Array, latent: jax.Array) -> jax.Array:
    """One word per slot: its token, its number within the token, its latent within the block."""
    return token << (SLOT_BITS + LATENT_BITS) | slot << LATENT_BITS | latent


def _grid(n: int, d: int, blocks: int, columns: int, chunk: int) -> Any:
    """All blocks of latents for some columns, then for the next ones; rows and values are not buffered twice."""
    once, parts = pl.Buffered(1), columns // LANES
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(d // columns, blocks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.HBM),
            pl.BlockSpec((n, LANES), lambda part, block, _: (0, 0), pipeline_mode=once),
            pl.BlockSpec((n, parts, LANES), lambda part, block, _: (0, part, 0), pipeline_mode=once),
        ],
        out_specs=[
            pl.BlockSpec((BLOCK // SUBLANES, parts, SUBLANES, LANES), lambda part, block, _: (block, part, 0, 0)),
            pl.BlockSpec((1, 1, BLOCK), lambda part, block, _: (block, 0, 0)),
        ],
        scratch_shapes=[
            # A line more for the sum of values, a latent more for what is not this block's.
            pltpu.VMEM((BLOCK + 1, parts + 1, LANES), jnp.float32),
            pltpu.SMEM((2 * chunk,), jnp.int32),
            pltpu.SemaphoreType.DMA((1,)),
            pltpu.SMEM((1,), jnp.int32),
        ],
    )


def _block(starts, words, values, rows, out, totals, sums, here, arrival, seen, *, unroll) -> None:
    """One block of latents: sums over its slots, which are starts[block] .. starts[block + 1] of the words."""
    block, (chunks, size), height = pl.program_id(1), words.shape, rows.shape[1]
    start, stop = starts[block], starts[block + 1]
    down = lambda number, by: number >> (by.bit_length() - 1)  # noqa: E731
    sums[...] = jnp.zeros_like(sums)

    def copy(chunk):
        place = pl.ds(pl.multiple_of((chunk & 1) * size, size), size)
        return pltpu.make_async_copy(words.at[chunk], here.at[place], arrival.at[0])

    @pl.when(block == 0)
    def _():
        seen[0] = -1
        copy(0).start()

    def take(chunk, state):
        # Blocks follow one another through the chunks; the first to meet one waits for it and sends for the next.
        @pl.when(chunk > seen[0])
        def _():
            copy(chunk).wait()
            seen[0] = chunk
            pl.when(chunk + 1 < chunks)(lambda: copy(chunk + 1).start())

        low, high = jnp.maximum(start - chunk * size, 0), jnp.minimum(stop - chunk * size, size)
        first, last = down(low, unroll), down(high + unroll - 1, unroll)
        group = functools.partial(_group, here, values, rows, sums, (chunk & 1) * size, unroll)
        masked = functools.partial(group, bounds=(low, high))
        state = masked(first, state)
        state = jax.lax.fori_loop(first + 1, last - 1, group, state)
        return jax.lax.fori_loop(jnp.maximum(first + 1, last - 1), last, masked, state)

    nothing = jnp.zeros((height, LANES), jnp.float32), jnp.zeros((1, LANES), jnp.float32), jnp.full((1, LANES), -1)
    jax.lax.fori_loop(down(start, size), down(stop + size - 1, size), take, nothing)
    _write(sums, out, totals)


def _group(words, values, rows, sums, base, unroll, number, state, bounds=None):
    """Adds `unroll` slots, or those of them in `bounds`, to state = (sum, total, latent) of the run at hand."""
    (total, amount, before), height = state, rows.shape[1]
    first = base + number * unroll
    for i in range(unroll):
        word = words[first + i]
        token, latent = word >> (SLOT_BITS + LATENT_BITS), word & (BLOCK - 1)
        # What can be is computed as a vector: the scalar units have enough to do with addresses.
        spread = jnp.full((SUBLANES, LANES), word)
        value = jnp.broadcast_to(values[pl.ds(token, 1), :], spread.shape)
        slot = (spread >> LATENT_BITS) & (LANES - 1)
        value = jnp.take_along_axis(value, slot, axis=1, mode="promise_in_bounds")  # the same everywhere
        now = spread[:1] & (BLOCK - 1)
        if bounds is not None:
            position = number * unroll + i
            latent = jnp.where((position >= bounds[0]) & (position < bounds[1]), latent, BLOCK)
            now = jnp.full((1, LANES), latent)
        new, before = now != before, now
        total = jnp.where(new, 0.0, total) + jnp.tile(value, (pl.cdiv(height, SUBLANES), 1))[:height] * rows[token]
        amount = jnp.where(new, 0.0, amount) + value[:1]
        sums[latent, :height, :] = total
        sums[latent, height:, :] = amount
    return total, amount, before


def _write(sums, out, totals) -> None:
    """Sums [128, c / 128, 128] to tiles [16, c / 128, 8, 128]; totals, alike in all lanes, to [1, 1, 128]."""
    height = out.shape[1]

    def eight(group, _):
        for column in range(height):
            out[group, column] = sums[pl.ds(group * SUBLANES, SUBLANES), column, :]

    jax.lax.fori_loop(0, BLOCK // SUBLANES, eight, None)
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (BLOCK, LANES))
    totals[0] = jnp.sum(jnp.where(iota(0) == iota(1), sums[:BLOCK, height, :], 0.0), axis=0, keepdims=True)


def columns_at_once(n: int, d: int, vmem: int) -> int:
    """The most columns of rows [n, d] that fit the vector memory with what else is needed; 0 where none do."""
    parts = [c for c in range(d - _REGISTERS, 0, -_REGISTERS) if d % c == 0] if d % _REGISTERS == 0 else []
    return next((c for c in [d, *parts] if needed_bytes(n, c) <= vmem * 3 // 4), 0)


def needed_bytes(n: int, columns: int) -> int:
    """Vector memory of rows, values, sums and results."""
    tiles = lambda lines: pl.cdiv(lines, SUBLANES) * SUBLANES * LANES  # noqa: E731
    return 4 * (n * (tiles(columns // LANES) + LANES) + (BLOCK + 1) * tiles(columns // LANES + 1) + 2 * BLOCK * columns)


def unsuited(device: Device, values: jax.Array, indices: jax.Array, rows: jax.Array, *, latents: int) -> str | None:
    """Why `sparse_outer` cannot serve this, or None."""
    (n, k), d = indices.shape, rows.shape[1]
    if (why := not_tpu(device)) is not None:
        return why
    if not all(array.dtype in (jnp.float32, jnp.bfloat16) for array in (values, rows)) or indices.dtype != jnp.int32:
        return f"values of {values.dtype}, indices of {indices.dtype}, rows of {rows.dtype}"
    if not 0 < k <= 1 << SLOT_BITS or not 0 < n < 1 << TOKEN_BITS:
        return f"{n} tokens of {k} slots: more than words of 32 bits tell apart, or none"
    if latents < 1 or not d or d % LANES or not columns_at_once(n, d, vmem_bytes(device)):
        return (
            f"{latents} latents, rows [{n}, {d}]: none, d no multiple of {LANES}, or more than the vector memory holds"
        )
    return None
