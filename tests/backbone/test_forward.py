"""The forward pass against itself: what is padded, packed, cut, chunked or rematerialised equals the plain run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone import layers
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import check_tokens, forward, init_params
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.taps import Tap

T = 12
ALL = (0, 1, 2, 3)
run = jax.jit(forward, static_argnames=("capture", "logits", "stop_after", "remat"))
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 50, shape)


TOKENS = ids(2, T)
NO_PADS = np.ones((2, T), bool)
LEFT, RIGHT = NO_PADS.copy(), NO_PADS.copy()
LEFT[1, :5], RIGHT[1, -5:] = False, False


@pytest.fixture(scope="module")
def observe(params, config):
    """Every layer's residual stream, the hidden states and all logits."""
    return lambda tokens, mask=NO_PADS, **data: run(params, config, tokens, mask=mask, capture=ALL, **data)


@pytest.fixture(scope="module")
def plain(observe):
    return observe(TOKENS)


@pytest.mark.parametrize("last", [0, 2, 3])
def test_stop_after_gives_the_bits_of_the_full_depth(params, config, plain, last):
    out = run(params, config, TOKENS, mask=NO_PADS, capture=tuple(range(last + 1)), stop_after=last)
    np.testing.assert_array_equal(out.captured, plain.captured[: last + 1])
    assert out.hidden is None
    assert out.logits is None


def test_captured_layers_come_in_the_order_asked_for(params, config, plain):
    out = run(params, config, TOKENS, mask=NO_PADS, capture=(3, 0, 2))
    np.testing.assert_array_equal(out.captured, plain.captured[np.array([3, 0, 2])])


def test_without_capture_there_are_no_rows(params, config, plain):
    out = run(params, config, TOKENS, mask=NO_PADS)
    assert out.captured.shape == (0, 2, T, 16)
    close(out.logits, plain.logits)


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_the_last_logits_are_those_of_each_rows_last_real_token(params, config, observe, mask):
    last = run(params, config, TOKENS, mask=mask, logits="last").logits
    expected = observe(TOKENS, mask).logits
    assert last.shape == (2, 50)
    for row in range(2):
        close(last[row], expected[row, np.flatnonzero(mask[row])[-1]])


def test_no_logits_still_give_the_hidden_states(params, config, plain):
    out = run(params, config, TOKENS, mask=NO_PADS, logits="none")
    assert out.logits is None
    close(out.hidden, plain.hidden)


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_padding_on_either_side_equals_no_padding(observe, plain, mask):
    padded = np.full((2, T), 49)  # a real id in the place of pads
    padded[0], padded[1, mask[1]] = TOKENS[0], TOKENS[1, :7]
    out = observe(padded, mask)
    close(out.captured[:, 0], plain.captured[:, 0])
    close(out.captured[:, 1, mask[1]], plain.captured[:, 1, :7])
    close(out.logits[1, mask[1]], plain.logits[1, :7])


def test_what_stands_at_pads_does_not_matter(observe):
    for mask in (LEFT, RIGHT):
        one, other = (observe(np.where(mask, TOKENS, fill), mask) for fill in (0, 33))
        np.testing.assert_array_equal(one.captured[:, mask], other.captured[:, mask])


def test_outputs_at_pads_are_finite_even_where_a_whole_row_is_padding(observe):
    mask = NO_PADS.copy()
    mask[1] = False
    out = observe(TOKENS, mask)
    assert np.isfinite(out.captured).all()
    assert np.isfinite(out.logits).all()


def test_packed_documents_equal_documents_alone(observe):
    # Three documents in one row, pads before, between and after; the third repeats the first one's id.
    lengths, starts, segment = (4, 3, 2), (1, 5, 9), (7, 3, 7)
    documents = [ids(n, seed=n) for n in lengths]
    row, mask, segments = np.full(T, 49), np.zeros(T, bool), np.full(T, 9)
    for document, start, name in zip(documents, starts, segment, strict=True):
        place = slice(start, start + len(document))
        row[place], mask[place], segments[place] = document, True, name
    both = lambda a: np.stack([a, a])  # noqa: E731
    packed = observe(both(row), both(mask), segment_ids=both(segments))
    for document, start in zip(documents, starts, strict=True):
        alone = np.full(T, 0)
        alone[: len(document)] = document
        expected = observe(both(alone), both(np.arange(T) < len(document)))
        n = len(document)
        close(packed.captured[:, 0, start : start + n], expected.captured[:, 0, :n])
        close(packed.logits[0, start : start + n], expected.logits[0, :n])


def test_documents_that_touch_and_repeat_an_id_stay_apart(observe, plain):
    # 4, 5, 3 tokens under the ids 1, 0, 1: the third must not see the first.
    segments = np.repeat([[1, 0, 1]], 2, axis=0).repeat([4, 5, 3], axis=1)
    out = observe(TOKENS, segment_ids=segments)
    close(out.captured[:, :, :4], plain.captured[:, :, :4])
    third = np.zeros_like(TOKENS)
    third[:, :3] = TOKENS[:, 9:]
    close(out.captured[:, :, 9:], observe(third).captured[:, :, :3])


def test_the_numbers_of_segment_ids_do_not_matter(observe):
    names = np.repeat([[0, 1, 2]], 2, axis=0).repeat([4, 5, 3], axis=1)
    one, other = observe(TOKENS, segment_ids=names), observe(TOKENS, segment_ids=100 - 7 * names)
    np.testing.assert_array_equal(one.captured, other.captured)


def test_explicit_positions_are_used(observe, plain):
    counting = np.tile(np.arange(T), (2, 1))
    close(observe(TOKENS, positions=counting).captured, plain.captured)
    # Rotary attention sees distances alone ...
    close(observe(TOKENS, positions=counting + 40).captured, plain.captured, rtol=1e-4, atol=1e-4)
    # ... and sees them.
    assert np.abs(observe(TOKENS, positions=3 * counting).captured - plain.captured).max() > 0.1


def test_later_tokens_never_change_earlier_ones(observe, plain):
    other = TOKENS.copy()
    other[:, 8:] = (other[:, 8:] + 1) % 50
    out = observe(other)
    np.testing.assert_array_equal(out.captured[:, :, :8], plain.captured[:, :, :8])
    assert not np.allclose(out.captured[0, :, 8:], plain.captured[0, :, 8:])


def test_rematerialised_gradients_are_equal_and_finite(params, config, next_token_loss, monkeypatch):
    grad = jax.jit(jax.grad(next_token_loss))
    expected = grad(params, config, TOKENS, LEFT)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(expected))

    # The same with dots kept and with the query rows in chunks: another program, the same derivative.
    monkeypatch.setattr(layers, "_QUERY_CHUNK", 5)
    found = jax.jit(jax.grad(functools.partial(next_token_loss, remat="dots")))(params, config, TOKENS, LEFT)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_query_rows_in_chunks_equal_all_at_once(params, config, observe, monkeypatch):
    expected = observe(TOKENS, LEFT)
    monkeypatch.setattr(layers, "_QUERY_CHUNK", 5)  # 12 rows: the last chunk is padded
    chunked = jax.jit(lambda p: forward(p, config, TOKENS, mask=LEFT, capture=ALL))(params)
    close(chunked.captured[:, LEFT], expected.captured[:, LEFT])
    assert np.isfinite(chunked.logits).all()


def test_other_parameters_tokens_and_taps_never_retrace(params, config, make_params):
    traces = []

    @jax.jit
    def counted(params, tokens, mask, tap):
        traces.append(1)
        return forward(params, config, tokens, mask=mask, tap=tap, logits="none").hidden

    for seed in (0, 1):
        tap = Tap(shift, jnp.full(4, float(seed)))
        counted(make_params(config, seed), ids(2, T, seed=seed), (LEFT, RIGHT)[seed], tap)
    assert len(traces) == 1


def shift(h, by, shared, ctx):
    return h + by, h[:, 0]


@pytest.mark.parametrize("stop_after", [None, 0, 4])
def test_a_longer_period_equals_a_period_of_one(config, make_params, stop_after, monkeypatch):
    """Six layers in periods of two: the same weights, interleaved; cuts end inside and between periods."""
    six = dataclasses.replace(config, num_layers=6, layer_types=("full",) * 6)
    single = make_params(six)
    tap, capture = Tap(shift, jnp.arange(6.0)), (0,) if stop_after == 0 else (1, 0)
    go = lambda p: forward(p, six, TOKENS, mask=LEFT, tap=tap, capture=capture, stop_after=stop_after)  # noqa: E731
    expected = jax.jit(go)(single)
    monkeypatch.setattr(ModelConfig, "period", property(lambda self: self.layer_types[:2]))
    paired = single | {"period": tuple(jax.tree.map(lambda a, s=s: a[s::2], single["period"][0]) for s in range(2))}
    found = jax.jit(lambda p: go(p))(paired)
    depth = 6 if stop_after is None else stop_after + 1
    assert expected.taps.shape == (depth, 2, 16)
    jax.tree.map(close, found, expected)


def test_the_period_is_the_shortest_pattern(config):
    kinds = lambda text: dataclasses.replace(config, num_layers=len(text), layer_types=tuple(text))  # noqa: E731
    assert kinds("aaaa").period == ("a",)
    assert kinds("aaabaaab").period == tuple("aaab")
    assert kinds("aaabaaab").num_periods == 2
    assert kinds("aab").period == tuple("aab")


def test_the_program_does_not_grow_with_depth(config):
    def lines(layers):
        deep = dataclasses.replace(config, num_layers=layers, layer_types=("full",) * layers)
        go = lambda p: forward(p, deep, TOKENS, capture=(0, 2), stop_after=None)  # noqa: E731
        return jax.jit(go).lower(parameter_shapes(deep, jnp.float32)).as_text().count("\n")

    assert lines(40) == lines(4)


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_every_matmul_reads_the_configs_precision(config, precision):
    chosen = dataclasses.replace(config, precision=precision)
    go = lambda p: forward(p, chosen, TOKENS, mask=LEFT)  # noqa: E731
    text = str(jax.make_jaxpr(go)(parameter_shapes(chosen, jnp.float32)))
    # q, k, v, o, scores, weighted values, three of the MLP, logits
    assert text.count("dot_general[") == 10
    assert text.count("precision=Precision.HIGHEST") + text.count("precision=(Precision.HIGHEST") == (
        10 if precision == "highest" else 0
    )


def test_the_dtype_of_the_parameters_is_the_dtype_of_the_stream(config):
    out = jax.eval_shape(lambda p: forward(p, config, TOKENS, capture=(1,)), parameter_shapes(config, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}


def test_init_gives_the_tree_that_loading_gives(config):
    for tied in (False, True):
        chosen = dataclasses.replace(config, tie_word_embeddings=tied)
        drawn = jax.eval_shape(lambda c=chosen: init_params(jax.random.key(0), c, dtype=jnp.bfloat16))
        assert drawn == parameter_shapes(chosen, jnp.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": (4,)}, r"capture = \(4,\) must be different layers among 0..3"),
        ({"capture": (1, 1)}, "must be different layers"),
        ({"capture": (-1,)}, "must be different layers"),
        ({"capture": (2,), "stop_after": 1}, "among 0..1, those that run"),
        ({"stop_after": 4}, "stop_after = 4; layers are 0..3"),
        ({"stop_after": -1}, "stop_after = -1; layers are 0..3"),
        ({"logits": "first"}, "logits = 'first'; expected 'all', 'last' or 'none'"),
        ({"remat": "some"}, "remat = 'some'; expected None or one of"),
        ({"mask": np.ones((2, 3), bool)}, r"mask has shape \(2, 3\), tokens have \(2, 12\)"),
        ({"positions": np.ones((2, 13), int)}, "positions has shape"),
        ({"segment_ids": np.ones((1, 12), int)}, "segment_ids has shape"),
        ({"segment_ids": np.ones((2, 12))}, "segment_ids holds float64; expected integers"),
        ({"mask": np.zeros((2, 12), np.float32)}, "mask holds float32; expected True and False"),
    ],
)
def test_options_that_do_not_fit_are_named(params, config, options, message):
    with pytest.raises(ValueError, match=message):
        forward(params, config, TOKENS, **options)


@pytest.mark.parametrize("tokens", [TOKENS[0], TOKENS.astype(np.float32), TOKENS[None]])
def test_tokens_are_integers_in_rows(params, config, tokens):
    with pytest.raises(ValueError, match="tokens must be integers"):
        forward(params, config, tokens)


@pytest.mark.parametrize("wrong", [50, -1, 151643])
def test_ids_beyond_the_vocabulary_are_refused_before_the_device(config, wrong):
    tokens = TOKENS.copy()
    check_tokens(tokens, config)
    tokens[1, 3] = wrong
    with pytest.raises(ValueError, match=f"token id {wrong} lies outside the model's vocabulary of 50"):
        check_tokens(tokens, config)
