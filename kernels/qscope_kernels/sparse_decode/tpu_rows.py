"""The loop that the TPU kernels of the decode share: the rows that codes name, by DMA, three tokens ahead of their use.

The weight stays as it lies. XLA's tiles of 8 rows by 128 columns are read as [f / 8, d / 128, 8, 128]: there a row is
d / 128 segments of 512 bytes, and lands as whole vector registers [d / 128, 128]. bfloat16 rows lie in pairs, packed
into one word per column: the pair is read, and one half of each word is used.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qscope_kernels.pallas_tpu import LANES, SUBLANES, call, pl, pltpu

TOKENS = 64  # per step of the grid
BUFFERS = 4  # tokens whose rows have a place: those of one are used while those of three are on their way


class Use(NamedTuple):
    """What is done with the rows of a token: `add` once per slot, in order of the slots, then `finish`."""

    start: Any
    add: Callable[[int, Any, jax.Array], Any]  # (slot, state, float32 row [d / 128, 128]) -> state
    finish: Callable[[Any], None]


def over_rows(
    use: Callable[[Any, Any, Any], Use],
    indices: jax.Array,
    w: jax.Array,
    extra: tuple[jax.Array, Any],
    out: tuple[tuple[int, ...], Any],
    name: str,
    interpret: Any,
) -> jax.Array:
    """Runs `use(extra_ref, out_ref, token)`, a token of the block at hand, on rows w[indices] of w [f, d] for indices
    [n, k]; `extra` is an array and its BlockSpec, `out` the shape of the float32 result and its BlockSpec."""
    (n, k), (f, d) = indices.shape, w.shape
    steps = pl.cdiv(n, TOKENS)
    codes = pad_tokens(jnp.clip(indices, 0, f - 1))
    block = lambda ahead: pl.BlockSpec(  # noqa: E731
        (TOKENS, k), lambda step: (jnp.minimum(step + ahead, steps - 1), 0), memory_space=pltpu.SMEM
    )
    word = jnp.float32 if w.dtype == jnp.float32 else jnp.uint32
    return call(
        functools.partial(_step, use, pl.cdiv(n, BUFFERS) * BUFFERS),
        codes,
        codes,
        extra[0],
        as_tiles(w),
        out=[(out[0], jnp.float32)],
        # In order: a step begins with the rows that the one before has asked for.
        semantics=["arbitrary"],
        vmem=needed_bytes(k, d) + (16 << 20),
        checks=False,  # the indices were clipped
        grid=(steps,),
        in_specs=[block(0), block(1), extra[1], pl.BlockSpec(memory_space=pltpu.HBM)],
        out_specs=[out[1]],
        scratch_shapes=[pltpu.VMEM((BUFFERS, k, d // LANES, LANES), word), pltpu.SemaphoreType.DMA((BUFFERS,))],
        name=name,
        interpret=interpret,
    )[0]


def _step(use, all_tokens, codes, next_codes, extra, w, out, buffers, arrivals) -> None:
    """One block of tokens: its indices and the next block's (scalar memory), w [f / 8, d / 128, 8, 128] (far away).

    The last block has what is left of `all_tokens`, a multiple of BUFFERS; of the rest of it nothing is asked.
    """
    step, last, ahead, slots = pl.program_id(0), pl.num_programs(0) - 1, BUFFERS - 1, range(codes.shape[1])

    def ask(codes, token, place, slot):
        pltpu.make_async_copy(_row(w, codes[token, slot]), buffers.at[place, slot], arrivals.at[place]).start()

    def take(token, coming, coming_token):
        place, free = token & (BUFFERS - 1), (token + ahead) & (BUFFERS - 1)
        state, add, finish = use(extra, out, token)
        pltpu.make_async_copy(buffers.at[place], buffers.at[place], arrivals.at[place]).wait()  # all its rows at once
        # Unrolled, so that most addresses are constants and a row is added while the next one is being asked for.
        for slot in slots:
            if coming is not None:
                ask(coming, coming_token, free, slot)
            state = add(slot, state, _widened(buffers[place, slot], codes[token, slot]))
        finish(state)

    def tokens(first, stop, coming, shift):
        jax.lax.fori_loop(first, stop, lambda token, _: take(token, coming, token + shift), None)

    @pl.when(step == 0)
    def _():
        for token in range(ahead):
            for slot in slots:
                ask(codes, token, token, slot)

    stop = jnp.minimum(all_tokens - step * TOKENS, TOKENS)
    tokens(0, stop - ahead, codes, ahead)
    pl.when(step < last)(lambda: tokens(TOKENS - ahead, TOKENS, next_codes, ahead - TOKENS))
    pl.when(step == last)(lambda: tokens(stop - ahead, stop, None, 0))


def _row(w: Any, index: jax.Array) -> Any:
    """The ref [d / 128, 128] of a row of w [f / 8, d / 128, 8, 128], or of the words that hold it and its neighbour."""
    if w.dtype == jnp.float32:
        return w.at[index >> 3, :, index & 7, :]
    return w.bitcast(jnp.uint32).at[index >> 3, :, (index >> 1) & 3, :]


def _widened(words: jax.Array, index: jax.Array) -> jax.Array:
    """The float32 row of this index: its own words, or one half of those of a pair of bfloat16 rows, even ones low."""
    if words.dtype == jnp.float32:
        return words
    # As a vector: the scalar units have enough to do with addresses.
    shift = 16 - 16 * (jnp.full((1, LANES), index, jnp.uint32) & 1)
    return jax.lax.bitcast_convert_type((words << shift) & jnp.uint32(0xFFFF0000), jnp.float32)


def as_tiles(array: jax.Array) -> jax.Array:
    """[n, d] as [n / 8, d / 128, 8, 128]: how it lies in memory, so that a compiler moves nothing."""
    n, d = array.shape
    return array.reshape(n // SUBLANES, SUBLANES, d // LANES, LANES).swapaxes(1, 2)


def tiled_block(d: int) -> Any:
    """The BlockSpec of one step's tokens of [n, d] as tiles."""
    return pl.BlockSpec((TOKENS // SUBLANES, d // LANES, SUBLANES, LANES), lambda step: (step, 0, 0, 0))


def at_token(token: jax.Array) -> tuple:
    """Where a token's row lies in such a block."""
    return token >> 3, slice(None), token & 7, slice(None)


def pad_tokens(codes: jax.Array) -> jax.Array:
    """Codes [n, k] with zeros for the tokens that the last step lacks."""
    return jnp.pad(codes, ((0, -codes.shape[0] % TOKENS), (0, 0)))


def needed_bytes(k: int, d: int) -> int:
    """Vector memory that rows in flight and two blocks of [n, d] take."""
    return 4 * d * (BUFFERS * k + 2 * TOKENS)
