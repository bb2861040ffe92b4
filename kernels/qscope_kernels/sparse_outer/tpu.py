"""TPU: the slots sorted by latent, all tokens' rows in vector memory, one sum at a time.

A slot costs a few cycles: it reads a row and its value, multiplies, adds to the sum of its latent, and stores the sum,
which the latent's next slot, if there is one, stores again. From far away a row is read once, not k times. The order
of additions follows from the indices alone; a latent that is active everywhere is a long run, no special case. Where
the rows of all tokens are too many, tiles of tokens follow one another, each adding to the sums of those before.
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
SLOT_BITS, LATENT_BITS = 7, 7  # of the word that says what a slot is; the token has the rest
FEWEST_TOKENS = 512  # in a tile: with fewer, reading and writing all sums again would be most of the work


def sparse_outer(
    values: jax.Array,
    indices: jax.Array,
    rows: jax.Array,
    *,
    latents: int,
    tokens: int | None = None,
    chunk: int = CHUNK,
    unroll: int = UNROLL,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Per latent, float32 sums of values [n, k] times rows [n, d] over the slots that name it [f, d], of values [f].

    At most `tokens` are in a tile, by default as many as fit; `chunk` and `unroll` are powers of two.
    """
    tokens = tokens or tokens_at_once(rows.shape[1], vmem_bytes(device_of(values, indices, rows)))
    options = {"latents": latents, "tokens": tokens, "chunk": chunk, "unroll": unroll, "interpret": interpret}
    return _outer(values, indices, rows, **options)


# Compiled once outside `jit` too, not at every call.
@functools.partial(jax.jit, static_argnames=("latents", "tokens", "chunk", "unroll", "interpret"))
def _outer(
    values: jax.Array,
    indices: jax.Array,
    rows: jax.Array,
    *,
    latents: int,
    tokens: int,
    chunk: int,
    unroll: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """As `sparse_outer`, the tokens in even tiles of at most `tokens`."""
    (n, k), d = values.shape, rows.shape[1]
    tiles = pl.cdiv(n, tokens)
    size = pl.cdiv(n, tiles)
    cut = lambda array: jnp.pad(array, ((0, tiles * size - n), (0, 0))).reshape(tiles, size, -1)  # noqa: E731
    starts, words = sorted_slots(cut(indices), latents)
    tile = (
        starts,
        jnp.pad(words, ((0, 0), (0, -size * k % chunk))).reshape(tiles, -1, chunk),
        jnp.pad(cut(values.astype(jnp.float32)), ((0, 0), (0, 0), (0, LANES - k))),
        cut(rows.astype(jnp.float32)).reshape(tiles, size, d // LANES, LANES),
    )
    add = functools.partial(_add_tile, latents=latents, unroll=unroll, interpret=interpret)
    sums, totals = add(None, [part[0] for part in tile])
    if tiles > 1:
        rest = [part[1:] for part in tile]
        (sums, totals), _ = jax.lax.scan(lambda before, tile: (add(before, tile), None), (sums, totals), rest)
    return sums.swapaxes(1, 2).reshape(-1, d)[:latents], totals.reshape(-1)[:latents]


def sorted_slots(indices: jax.Array, latents: int) -> tuple[jax.Array, jax.Array]:
    """Of tiles of tokens [t, n, k]: where each block's slots start [t, blocks + 1], and the words [t, n k] in order.

    One sort over all tiles, a function of the indices alone: see `order`.
    """
    tiles, n, k = indices.shape
    first = jnp.arange(tiles, dtype=jnp.int32) * latents
    keys = jnp.clip(indices, 0, latents - 1).astype(jnp.int32) + first[:, None, None]
    keys, slots, _ = order(keys.reshape(-1, k), tiles * latents)
    borders = jnp.minimum(jnp.arange(pl.cdiv(latents, BLOCK) + 1, dtype=jnp.int32) * BLOCK, latents)
    starts = jnp.searchsorted(keys, first[:, None] + borders, method="scan_unrolled").astype(jnp.int32)
    latent = (keys.reshape(tiles, -1) - first[:, None]) % BLOCK
    token, slot = slots.reshape(tiles, -1) // k % n, slots.reshape(tiles, -1) % k
    words = token << (SLOT_BITS + LATENT_BITS) | slot << LATENT_BITS | latent
    return starts - jnp.arange(tiles, dtype=jnp.int32)[:, None] * (n * k), words


def _add_tile(before, tile, *, latents: int, unroll: int, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """The sums so far, as tiles [f / 8, d / 128, 8, 128] and [f / 128, 1, 128], plus those of one tile of tokens."""
    _, words, values, rows = tile
    (n, height, _), blocks = rows.shape, pl.cdiv(latents, BLOCK)
    whole = lambda array: pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))  # noqa: E731
    results = [
        pl.BlockSpec((BLOCK // SUBLANES, height, SUBLANES, LANES), lambda block, _: (block, 0, 0, 0)),
        pl.BlockSpec((1, 1, BLOCK), lambda block, _: (block, 0, 0)),
    ]
    shapes = [(pl.cdiv(latents, SUBLANES), height, SUBLANES, LANES), (blocks, 1, BLOCK)]
    sums, totals = call(
        functools.partial(_block, unroll=unroll),
        *tile,
        *(before or ()),
        out=[(shape, jnp.float32) for shape in shapes],
        semantics=["arbitrary"],
        vmem=needed_bytes(n, height * LANES) + (8 << 20),
        checks=False,  # of the addresses that words give
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM), whole(values), whole(rows), *(results if before else [])],
            out_specs=results,
            scratch_shapes=[
                # A line more for the sum of values, a latent more for what is not this block's.
                pltpu.VMEM((BLOCK + 1, height + 1, LANES), jnp.float32),
                pltpu.SMEM((2 * words.shape[1],), jnp.int32),
                pltpu.SemaphoreType.DMA((1,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        input_output_aliases={4: 0, 5: 1} if before else {},
        name="sparse_outer",
        interpret=interpret,
    )
    return sums, totals


def _block(starts, words, values, rows, *refs, unroll) -> None:
    """One block of latents: sums over its slots, which are starts[block] .. starts[block + 1] of the words."""
    *before, out, totals, sums, here, arrival, seen = refs
    block, (chunks, size), height = pl.program_id(0), words.shape, rows.shape[1]
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
    _write(before, sums, out, totals)


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


def _write(before, sums, out, totals) -> None:
    """Adds sums [128, d / 128, 128] to tiles [16, d / 128, 8, 128]; totals, alike in all lanes, to [1, 1, 128]."""
    height = out.shape[1]

    def eight(group, _):
        for column in range(height):
            mine = sums[pl.ds(group * SUBLANES, SUBLANES), column, :]
            out[group, column] = before[0][group, column] + mine if before else mine

    jax.lax.fori_loop(0, BLOCK // SUBLANES, eight, None)
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (BLOCK, LANES))
    mine = jnp.sum(jnp.where(iota(0) == iota(1), sums[:BLOCK, height, :], 0.0), axis=0, keepdims=True)
    totals[0] = before[1][0] + mine if before else mine


def tokens_at_once(d: int, vmem: int) -> int:
    """How many tokens' rows [n, d] leave a quarter of the vector memory to the compiler; 0 where too few do."""
    fixed, each = needed_bytes(0, d), needed_bytes(1, d) - needed_bytes(0, d)
    most = (vmem * 3 // 4 - fixed) // each // SUBLANES * SUBLANES
    return most if most >= FEWEST_TOKENS else 0


def needed_bytes(n: int, d: int) -> int:
    """Vector memory of rows and values of n tokens, of a block's sums and of the four buffers for results."""
    tiles = lambda lines: pl.cdiv(lines, SUBLANES) * SUBLANES * LANES  # noqa: E731
    return 4 * (n * (tiles(d // LANES) + LANES) + (BLOCK + 1) * tiles(d // LANES + 1) + 4 * BLOCK * (d + LANES))


def unsuited(device: Device, values: jax.Array, indices: jax.Array, rows: jax.Array, *, latents: int) -> str | None:
    """Why `sparse_outer` cannot serve this, or None."""
    (n, k), d = indices.shape, rows.shape[1]
    if (why := not_tpu(device)) is not None:
        return why
    if not all(array.dtype in (jnp.float32, jnp.bfloat16) for array in (values, rows)) or indices.dtype != jnp.int32:
        return f"values of {values.dtype}, indices of {indices.dtype}, rows of {rows.dtype}"
    if not n or not 0 < k <= 1 << SLOT_BITS or latents < 1:
        return f"{n} tokens of {k} slots for {latents} latents: none, or more than {1 << SLOT_BITS} slots"
    if not d or d % LANES or not tokens_at_once(d, vmem_bytes(device)):
        return f"d = {d}: no multiple of {LANES}, or rows so long that few fit the vector memory"
    return None
