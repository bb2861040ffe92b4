"""A row in pieces equals the row at once: in every family, cut anywhere, padded anyhow, one segment or many.

A causal model gives the first n tokens of a row the same outputs whatever follows, so that one pass over whole rows
without a cache is what all pieces are held against.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.cache import FullSlot, LinearSlot, init_cache
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.taps import Tap
from tests.backbone.families import FAMILIES, QUICK, VOCAB, make_config, make_params, relative_l2, tokens_of

T = 146  # the columns of a cache here
LAYERS = (0, 3, 6)
TOKENS = tokens_of(2, T)
REAL = np.ones((2, T), bool)
# Ids may skip numbers. The borders lie inside the chunks below, at their ends, and one token beside them.
SEGMENTS = np.stack([np.repeat([3, 4, 9, 10, 40], [9, 1, 64, 2, 70]), np.repeat([0, 5, 6], [65, 7, 74])])
ONE_SEGMENT = np.zeros((2, T), int)


def nudge(h, by, shared, ctx):
    """A tap that changes the stream by position, and tells what it was given."""
    return h + by * jnp.cos(ctx.positions)[..., None], (ctx.positions, ctx.segment_ids)


class Model:
    """A family's parameters and one jitted step, which takes over its cache; counts its compilations by length."""

    def __init__(self, family):
        self.config, self.traces = make_config(family), []
        self.params = make_params(self.config)
        tap = Tap(nudge, jnp.linspace(0.1, 0.2, self.config.num_layers))

        @functools.partial(jax.jit, donate_argnames="cache", compiler_options=QUICK)
        def step(params, tokens, mask, segment_ids, cache=None, positions=None):
            self.traces.append(tokens.shape[1])
            data = dict(mask=mask, segment_ids=segment_ids, positions=positions, cache=cache)
            return forward(params, self.config, tokens, tap=tap, capture=LAYERS, **data)

        self.step = functools.partial(step, self.params)
        self.whole = functools.cache(lambda packed: self.step(TOKENS, REAL, SEGMENTS if packed else ONE_SEGMENT))

    def empty(self, dtype=jnp.float32):
        return init_cache(self.config, 2, T, dtype=dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return _model(request.param)


_model = functools.cache(Model)


def full(t):
    return (t, (0, t), (0, t))


# Calls of t columns, of which each row fills those from a to b with its next tokens (or from a to b and from c to d);
# the others are pads.
PIECES = {
    "prefill, then one by one": [full(65), *[full(1)] * 12],
    "uneven chunks that fill it": [full(t) for t in (7, 65, 1, 7, 1, 65)],
    "padded left, then one by one": [(65, (0, 65), (40, 65)), *[full(1)] * 12],
    "padded right, then one by one": [(65, (0, 65), (0, 25)), *[full(1)] * 12],
    "padded left, shorter than the convolution": [(7, (5, 7), (6, 7)), *[full(1)] * 5, full(7)],
    "padded right, shorter than the convolution": [(7, (0, 2), (0, 1)), full(1), full(1), full(7)],
    "chunks that begin with pads": [full(7), (7, (3, 7), (6, 7)), (65, (1, 65), (64, 65)), (7, (5, 7), (0, 7))],
    "padded on both sides": [(7, (2, 5), (1, 6)), (65, (30, 61), (1, 2)), (7, (4, 6), (1, 2)), full(1), full(7)],
    "a token now and then": [(7, (6, 7), (0, 1)), (7, (4, 5), (6, 7)), full(1), full(7)],
    "rows that pause": [full(7), (1, (0, 1), (0, 0)), (65, (0, 65), (65, 65)), (7, (0, 0), (0, 1)), full(1), full(7)],
    "a row that begins late": [(7, (0, 7), (7, 7)), (65, (0, 65), (0, 0)), (1, (0, 1), (0, 0)), full(7), full(1)],
}  # fmt: skip


def place(call, done, segments):
    """The arguments of one call: each row's next tokens in their columns; other ids and segments at pads."""
    t, *columns = call
    tokens, mask, ids = np.full((2, t), VOCAB - 1), np.zeros((2, t), bool), np.full((2, t), 77)
    for row, bounds in enumerate(columns):
        here = np.concatenate([np.arange(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True)])
        new = slice(done[row], done[row] + len(here))
        tokens[row, here], ids[row, here], mask[row, here] = TOKENS[row, new], segments[row, new], True
        done[row] = new.stop
    return tokens, mask, ids


def play(model, calls, segments, cache):
    """Outputs of every row at its real tokens, one after the other, and the cache behind them."""
    done, rows = [0, 0], ([], [])
    for call in calls:
        tokens, mask, ids = place(call, done, segments)
        out = model.step(tokens, mask, ids, cache)
        cache = out.cache
        assert np.isfinite(out.logits).all()  # at pads too
        for row in range(2):
            rows[row].append([np.moveaxis(a, -2, 0)[mask[row]] for a in per_row(out, row)])
    return [[np.concatenate(parts) for parts in zip(*row, strict=True)] for row in rows], cache


def per_row(out, row):
    """What is compared, with time as the axis before the last: hidden, logits, captured; positions and segments."""
    told = [np.asarray(a)[:, row, :, None] for a in out.taps]
    return [np.asarray(a) for a in (out.hidden[row], out.logits[row], out.captured[:, row])] + told


def assert_rows_equal(rows, expected, limit=1e-5):
    for row, parts in enumerate(rows):
        wanted = [np.moveaxis(a, -2, 0)[: len(parts[0])] for a in per_row(expected, row)]
        for name, found, want in zip(("hidden", "logits", "captured"), parts, wanted, strict=False):
            assert relative_l2(found, want) < limit, f"{name} of row {row}"
        np.testing.assert_array_equal(parts[3], wanted[3], f"positions of row {row}")
        np.testing.assert_array_equal(parts[4], wanted[4], f"segments of row {row}")


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["one segment", "packed"])
@pytest.mark.parametrize("pieces", PIECES)
def test_pieces_equal_the_whole(model, pieces, packed):
    rows, cache = play(model, PIECES[pieces], SEGMENTS if packed else ONE_SEGMENT, model.empty())
    assert_rows_equal(rows, model.whole(packed))
    assert int(cache.length) == sum(t for t, *_ in PIECES[pieces])


def test_pads_may_stand_between_the_segments_of_a_call(model):
    calls = [full(7), (65, (0, 2, 5, 6, 10, 65), (3, 61, 63, 65)), full(1), (7, (1, 7), (0, 4, 6, 7)), full(7)]
    rows, _ = play(model, calls, SEGMENTS, model.empty())
    assert_rows_equal(rows, model.whole(True))


@pytest.mark.slow
def test_chunks_as_long_as_those_of_the_delta_rule_and_as_the_convolution_or_shorter():
    model = _model("qwen3_5")
    for segments, packed in ((ONE_SEGMENT, False), (SEGMENTS, True)):
        rows, _ = play(model, [full(t) for t in (3, 64, 2, 2, 1, 3, 64, 7)], segments, model.empty())
        assert_rows_equal(rows, model.whole(packed))


def test_one_compilation_serves_every_step_and_the_last_column(model):
    _, cache = play(model, [full(t) for t in (65, 65, 7, 7, 1, 1)], ONE_SEGMENT, model.empty())
    assert model.traces.count(1) == 1
    assert int(cache.length) == cache.capacity


def test_beyond_the_capacity_there_is_nan_where_the_length_is_hidden(model):
    _, cache = play(model, PIECES["uneven chunks that fill it"], ONE_SEGMENT, model.empty())
    for _ in range(2):  # and it stays so
        out = model.step(TOKENS[:, :1], REAL[:, :1], ONE_SEGMENT[:, :1], cache)
        cache = out.cache
        assert all(np.isnan(a).all() for a in (out.hidden, out.logits, out.captured))


@pytest.mark.slow
def test_positions_may_be_given_and_the_last_segment_goes_on_without_ids():
    """Three calls: ids alone; positions alone, which leaves the segment that of the cache; ids again."""
    model = _model("qwen3_5")
    columns = lambda a, n: a[:, 7 * n : 7 * n + 7]  # noqa: E731
    ids, given = np.full((2, T), 8), np.tile(3 * np.arange(7) + 50, (2, 1))
    positions = np.tile(np.arange(T), (2, 1))
    positions[:, 7:14], positions[:, 14:] = given, np.arange(T - 14) + given[0, -1] + 1  # counts on from the last one
    ids[1, 14:] = 9  # the second row begins a segment in the last call: it counts from 0 there
    positions[1, 14:] = np.arange(T - 14)
    expected, cache, parts = model.step(TOKENS, REAL, ids, positions=positions), model.empty(), []
    for n, (segments, explicit) in enumerate([(columns(ids, 0), None), (None, given), (columns(ids, 2), None)]):
        out = model.step(columns(TOKENS, n), columns(REAL, n), segments, cache, explicit)
        cache = out.cache
        parts.append([np.moveaxis(a, -2, 0) for row in range(2) for a in per_row(out, row)])
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    assert_rows_equal([joined[:5], joined[5:]], expected)


def test_a_bfloat16_cache_rounds_what_it_holds_and_nothing_else():
    model = _model("qwen3_5")
    calls = [full(7), full(7)]
    rows, cache = play(model, calls, ONE_SEGMENT, model.empty(jnp.bfloat16))
    assert_rows_equal(rows, model.whole(False), limit=2e-2)
    assert relative_l2(rows[0][0], np.asarray(model.whole(False).hidden)[0, :14]) > 1e-4
    assert jax.tree.map(lambda a: a.dtype, cache) == jax.tree.map(lambda a: a.dtype, model.empty(jnp.bfloat16))
    assert {slot.state.dtype for slot in cache.slots if isinstance(slot, LinearSlot)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_donated_cache_is_never_copied(family):
    config = make_config(family, num_hidden_layers=32)
    cache = jax.eval_shape(lambda: init_cache(config, 2, 4096, dtype=jnp.float32))
    step = jax.jit(
        lambda params, tokens, cache: forward(params, config, tokens, cache=cache),
        donate_argnums=2,
        compiler_options=QUICK,
    )
    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    memory = step.lower(parameter_shapes(config, jnp.float32), token, cache).compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    # On the CPU XLA lays out one period's keys and values anew for their matmuls; it never does so for two at once.
    assert memory.temp_size_in_bytes < 1.5 * size / config.num_periods < size / 4


def test_a_row_that_ended_in_an_earlier_call_has_no_last_logits_in_this_one():
    model, mask = _model("qwen3"), np.ones((2, 6), bool)
    mask[0, 2:] = False
    go = functools.partial(forward, model.params, model.config, logits="last")
    cache = go(TOKENS[:, :3], mask=mask[:, :3], cache=init_cache(model.config, 2, 6)).cache
    logits = go(TOKENS[:, 3:6], mask=mask[:, 3:], cache=cache).logits
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


def test_an_empty_cache_has_the_widths_of_the_family():
    config = make_config("qwen3_5")
    cache = init_cache(config, 3, 5)
    assert cache.capacity == 5
    assert cache.conv_segments.shape == (3, 3)
    linear, full = cache.slots[0], cache.slots[3]
    assert isinstance(linear, LinearSlot)
    assert isinstance(full, FullSlot)
    assert (linear.q.shape, linear.v.shape) == ((2, 3, 3, 2, 6), (2, 3, 3, 6, 10))
    assert (linear.state.shape, full.k.shape) == ((2, 3, 6, 6, 10), (2, 3, 5, 2, 8))
    assert {full.k.dtype, full.v.dtype, linear.q.dtype, linear.v.dtype} == {jnp.dtype("float32")}
    fast = init_cache(dataclasses.replace(config, precision="default"), 3, 5).slots[3]
    assert {fast.k.dtype, fast.v.dtype} == {jnp.dtype("bfloat16")}
    assert len(init_cache(make_config("qwen3"), 3, 5).slots) == 1


@pytest.mark.parametrize(("batch", "capacity"), [(0, 4), (2, 0), (-1, 4)])
def test_a_cache_has_at_least_one_row_and_one_column(batch, capacity):
    with pytest.raises(ValueError, match=f"a cache of {batch} rows and {capacity} columns; both must be at least 1"):
        init_cache(make_config("qwen3"), batch, capacity)


def test_a_cache_that_does_not_fit_is_refused_by_name():
    model = _model("qwen3")
    cache = init_cache(model.config, 2, 8)
    go = functools.partial(forward, model.params, model.config)
    with pytest.raises(ValueError, match="the cache has 8 columns, of which 0 are filled; 9 more do not fit"):
        go(TOKENS[:, :9], cache=cache)
    with pytest.raises(ValueError, match="the cache has 8 columns, of which 5 are filled; 4 more do not fit"):
        go(TOKENS[:, :4], cache=cache._replace(length=jnp.asarray(5)))
    with pytest.raises(ValueError, match="the cache has 8 columns, of which some are filled; 9 more do not fit"):
        jax.eval_shape(lambda c: go(TOKENS[:, :9], cache=c), cache)
    with pytest.raises(ValueError, match="the cache has 2 rows, tokens have 1"):
        go(TOKENS[:1, :3], cache=cache)
    with pytest.raises(ValueError, match="the cache was made for another model"):
        go(TOKENS[:, :3], cache=init_cache(make_config("qwen3", num_key_value_heads=1), 2, 8))
    with pytest.raises(ValueError, match="stop_after leaves the layers behind it without these tokens"):
        go(TOKENS[:, :3], cache=cache, stop_after=2)
