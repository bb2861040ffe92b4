"""What all blocks of one forward pass share: positions, segments, which tokens are real, and what came before.

A row may hold several documents (segments) and pads at its ends or between segments. Segments are compared by their
ordinal in the row, counted over calls when a cache is given, so that an id that comes back never joins two documents.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.backbone.cache import Cache
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.taps import TapContext


class BlockContext(NamedTuple):
    """Columns s are those of this call, or of the cache's whole capacity if there is one; u = conv_width - 1.

    A row is not sound if linear layers cannot run it: the convolution counts columns, so that a segment has no gaps.
    """

    cos: Float[Array, "b t r"]
    sin: Float[Array, "b t r"]
    mask: Bool[Array, "b t"]
    segments: Int[Array, "b t"]
    reset: Bool[Array, "b t"]
    sound: Bool[Array, "b"]
    start: Int[Array, ""]
    key_segments: Int[Array, "b s"]
    conv: "ConvContext | None"


class ConvContext(NamedTuple):
    """Where the convolution finds the last real tokens; "extended" = the u tokens before this call, then its own t."""

    first: Int[Array, "b"]
    extended: Int[Array, "b u+t"]
    last: Int[Array, "b u"]


def make_contexts(
    tokens, mask, positions, segment_ids, cache: Cache | None, config: ModelConfig, dtype, *, prompt_lengths=None
) -> tuple[BlockContext, TapContext, Cache | None]:
    """The contexts of the blocks and the tap, and the cache with this call's tokens entered (not yet their layers)."""
    real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    ids = _segment_ids(tokens, segment_ids, cache)
    segments, reset, gaps = _ordinals(ids, real, cache)
    sound = jnp.ones(tokens.shape[:1], bool) if config.linear is None else ~jnp.any(gaps, axis=1)
    if positions is None:
        positions = _running_positions(segments, real, cache)
    cos, sin = rope_tables(positions, config, dtype)
    own = jnp.where(real, segments, -1)
    start, keys = jnp.zeros((), jnp.int32), own
    if cache is not None:
        start = cache.length
        keys = jax.lax.dynamic_update_slice(cache.segments, own, (jnp.zeros((), start.dtype), start))
    conv = None if config.linear is None else _conv_context(own, cache, config.linear.conv_width - 1)
    block = BlockContext(cos, sin, real, segments, reset, sound, start, keys, conv)
    if cache is not None:
        cache = _enter(cache, block, ids, positions)
    return block, TapContext(positions, real, segments, _prompts(prompt_lengths, positions, real, segments)), cache


def _prompts(lengths, positions, real, segments):
    """The length of the prompt that each token belongs to; without any, its segment ends with this call's tokens."""
    if lengths is not None:
        return jnp.broadcast_to(lengths if jnp.ndim(lengths) == 2 else lengths[:, None], real.shape)
    ends = jnp.where(real, positions + 1, 0)
    own = segments - segments[:, :1]
    longest = jax.vmap(lambda end, row: jax.ops.segment_max(end, row, num_segments=len(row))[row])
    return longest(ends, own)


def check_rows(segment_ids, mask, cache: Cache | None, *, gaps: bool) -> None:
    """Refuses segment ids that go backwards along the real tokens of a row: two documents were joined wrongly.

    Unless `gaps` are allowed, also pads inside a segment.

    Raises:
      ValueError: the first such place.
    """
    given = segment_ids is not None
    if gaps and not given:
        return
    ids, real = np.asarray(segment_ids), np.asarray(mask, bool)
    ends = None if cache is None or not given else np.where(cache.ordinal >= 0, cache.last_segment, _NONE)
    for row in range(len(real)):
        columns = np.flatnonzero(real[row])
        here = ids[row, columns] if given else np.zeros(len(columns), int)
        if ends is not None and len(columns) and here[0] < ends[row]:
            raise ValueError(
                f"segment_ids go backwards in row {row}: {ends[row]} at the end of the cache, {here[0]} at column "
                f"{columns[0]}; {_ORDER}"
            )
        for i in np.flatnonzero(np.diff(here) < 0)[:1]:
            raise ValueError(
                f"segment_ids go backwards in row {row}: {here[i]} at column {columns[i]}, {here[i + 1]} at column "
                f"{columns[i + 1]}; {_ORDER}"
            )
        for i in np.flatnonzero((np.diff(columns) > 1) & (np.diff(here) == 0))[:1] if not gaps else ():
            raise ValueError(
                f"mask has pads inside a segment of row {row}, behind column {columns[i]}; linear layers need "
                "the tokens of a segment side by side: pads stand at the ends of a row and between segments"
            )


_NONE = np.iinfo(np.int32).min  # no segment yet: every id comes after it
_ORDER = "number the documents of a row in the order in which they stand"


def rope_tables(positions: Int[Array, "b t"], config: ModelConfig, dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [b, t, r] of the rotary angles, computed in float32.

    The frequencies are made on the host and rounded where PyTorch rounds: one float32 ulp in them is 2.5e-4 in the
    cosine at position 32,767.
    """
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    powers = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1) / powers
    angles = positions.astype(jnp.float32)[..., None] * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _segment_ids(tokens, segment_ids, cache: Cache | None):
    """Without ids, one segment: that of the cache goes on."""
    if segment_ids is not None:
        return segment_ids.astype(jnp.int32)
    last = jnp.zeros(tokens.shape[:1], jnp.int32) if cache is None else cache.last_segment
    return jnp.broadcast_to(last[:, None], tokens.shape)


def _ordinals(ids, real, cache: Cache | None):
    """Numbers the segments of each row in order; marks the real tokens that begin one (but the row's first), and those
    behind pads inside one."""
    columns = jnp.arange(real.shape[1])
    last_real = jax.lax.cummax(jnp.where(real, columns, -1), axis=1)
    previous = jnp.pad(last_real, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    before = jnp.take_along_axis(ids, jnp.maximum(previous, 0), axis=1)
    gaps = real & (previous >= 0) & (previous < columns - 1) & (ids == before)
    known, base = previous >= 0, 0
    if cache is not None:
        before = jnp.where(known, before, cache.last_segment[:, None])
        known |= (cache.ordinal >= 0)[:, None]
        base = jnp.maximum(cache.ordinal, 0)[:, None]
    reset = real & known & (ids != before)
    return base + jnp.cumsum(reset, axis=1, dtype=jnp.int32), reset, gaps


def _running_positions(segments, real, cache: Cache | None):
    """0, 1, 2, … over the real tokens of each segment; pads take the position before them."""
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    done = jnp.zeros((), jnp.int32)
    if cache is not None:
        # The tokens of the cache's last segment count on from it.
        done = jnp.where(segments == cache.ordinal[:, None], cache.position[:, None], 0)
    offset = jax.lax.cummax(jnp.where(starts, count - real, 0), axis=1)
    return jnp.maximum(done + count - offset - 1, 0)


def _conv_context(own, cache: Cache | None, u: int) -> ConvContext:
    """`own` [b, t]: the ordinal of each token, -1 at pads."""
    b, t = own.shape
    before = jnp.full((b, u), -1, jnp.int32) if cache is None else cache.conv_segments
    # The tokens before this call stand next to its first real one, wherever the row begins.
    first = jnp.where(jnp.any(own >= 0, axis=1), jnp.argmax(own >= 0, axis=1), t).astype(jnp.int32)
    extended = place_before(before, own, first)
    if t > 1:
        extended = jnp.where(jnp.arange(u + t) < first[:, None], -1, extended)
    left, last = jnp.where(extended >= 0, jnp.arange(u + t), -1), []
    for _ in range(u):
        last.append(jnp.max(left, axis=1))
        left = jnp.where(left >= last[-1][:, None], -1, left)
    return ConvContext(first, extended, jnp.stack(last[::-1], axis=1).astype(jnp.int32))


def place_before(before, own, first):
    """[b, u + t, …]: the call's own [b, t, …] after u free places, with `before` [b, u, …] next to column `first`."""
    extended = jnp.concatenate([before, own], axis=1)
    if own.shape[1] == 1:
        return extended  # a single token: either it is real, or it is a pad and nothing is lost
    place = lambda row, piece, at: jax.lax.dynamic_update_slice_in_dim(row, piece, at, 0)  # noqa: E731
    return jax.vmap(place)(extended, before, first)


def _enter(cache: Cache, block: BlockContext, ids, positions) -> Cache:
    """The bookkeeping of the cache after this call's tokens."""
    t = block.mask.shape[1]
    any_real = jnp.any(block.mask, axis=1)
    last = t - 1 - jnp.argmax(block.mask[:, ::-1], axis=1)
    pick = lambda new, old: jnp.where(any_real, jnp.take_along_axis(new, last[:, None], 1)[:, 0], old)  # noqa: E731
    conv = cache.conv_segments
    if block.conv is not None:
        conv = jnp.take_along_axis(block.conv.extended, jnp.maximum(block.conv.last, 0), axis=1)
        conv = jnp.where(block.conv.last >= 0, conv, -1)
    return cache._replace(
        length=cache.length + t, segments=block.key_segments, conv_segments=conv,
        last_segment=pick(ids, cache.last_segment), ordinal=pick(block.segments, cache.ordinal),
        position=pick(positions + 1, cache.position),
    )  # fmt: skip
