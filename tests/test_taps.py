"""A tap sees the residual stream after every layer, may change it, and is data: other data never recompile."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.cache import init_cache
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward, init_params
from qscope_jax.taps import Tap, chain, check_tap

CONFIG = ModelConfig(
    model_type="qwen3", vocab_size=40, hidden_size=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8,
    rotary_dim=8, intermediate_size=24, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
    tie_word_embeddings=True, layer_types=("full",) * 4, linear=None, moe=None, eos_token_ids=(), precision="highest",
)  # fmt: skip
PARAMS = jax.tree.map(lambda a: 10 * a, init_params(jax.random.key(0), CONFIG))
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 6))
ALL = (0, 1, 2, 3)
run = jax.jit(forward, static_argnames=("capture", "logits", "stop_after", "remat"))


def observe(tap=None, **options):
    return run(PARAMS, CONFIG, TOKENS, tap=tap, capture=ALL, logits="none", **options)


@pytest.fixture(scope="module")
def plain():
    return observe()


# Tap functions, at module level as the docstring asks.
def leave(h, per_layer, shared, ctx):
    return h, ()


def add(h, strength, direction, ctx):
    return h + strength * direction, ()


def double(h, per_layer, shared, ctx):
    return 2 * h, ()


def read_mean(h, per_layer, shared, ctx):
    return h, {"mean": h.mean(axis=-1), "layer": per_layer}


@dataclass(frozen=True)
class Scale:
    by: float

    def __call__(self, h, per_layer, shared, ctx):
        return self.by * h, ()


def test_the_identity_leaves_every_bit(plain):
    out = observe(Tap(leave))
    np.testing.assert_array_equal(out.captured, plain.captured)
    np.testing.assert_array_equal(out.hidden, plain.hidden)
    assert out.taps == ()


def test_adding_zero_leaves_every_bit(plain):
    out = observe(Tap(add, jnp.zeros(4), jnp.ones(16)))
    np.testing.assert_array_equal(out.captured, plain.captured)


def test_a_change_at_one_layer_shows_there_and_flows_on(plain):
    direction = jnp.arange(16.0)
    out = observe(Tap(add, jnp.zeros(4).at[2].set(3.0), direction))
    np.testing.assert_array_equal(out.captured[:2], plain.captured[:2])
    np.testing.assert_allclose(out.captured[2], plain.captured[2] + 3 * direction, rtol=1e-6)
    assert not np.allclose(out.captured[3], plain.captured[3] + 3 * direction)


def test_a_chain_applies_in_order(plain):
    ones = jnp.ones(16)
    only_last = jnp.zeros(4).at[3].set(1.0)
    adds, doubles = Tap(add, only_last, ones), Tap(add, only_last, 2 * ones)
    first = observe(chain(adds, doubles)).captured[3]
    np.testing.assert_allclose(first, plain.captured[3] + 3, rtol=1e-5, atol=1e-5)
    # x -> 2 (x + 1) and x -> 2 x + 1 at layer 0, where nothing came before.
    first_layer = Tap(add, jnp.zeros(4).at[0].set(1.0), ones)
    after, before = observe(chain(first_layer, Tap(double))), observe(chain(Tap(double), first_layer))
    np.testing.assert_allclose(after.captured[0], 2 * (plain.captured[0] + 1), rtol=1e-6)
    np.testing.assert_allclose(before.captured[0], 2 * plain.captured[0] + 1, rtol=1e-6)


def test_a_chain_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one tap"):
        chain()


def test_outputs_are_stacked_by_layer(plain):
    out = observe(Tap(read_mean, jnp.arange(4)))
    np.testing.assert_array_equal(out.taps["layer"], np.arange(4))
    np.testing.assert_allclose(out.taps["mean"], plain.captured.mean(axis=-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.captured, plain.captured)


def test_outputs_of_a_chain_are_a_tuple_in_its_order(plain):
    out = observe(chain(Tap(leave), Tap(read_mean, jnp.arange(4)), Tap(add, jnp.zeros(4), jnp.ones(16))))
    assert out.taps[0] == ()
    assert out.taps[2] == ()
    np.testing.assert_array_equal(out.taps[1]["layer"], np.arange(4))


def test_with_stop_after_only_the_layers_that_ran_give_outputs(plain):
    out = run(PARAMS, CONFIG, TOKENS, tap=Tap(read_mean, jnp.arange(4)), stop_after=1)
    np.testing.assert_array_equal(out.taps["layer"], [0, 1])
    np.testing.assert_allclose(out.taps["mean"], plain.captured[:2].mean(axis=-1), rtol=1e-5, atol=1e-5)


def read_context(h, per_layer, shared, ctx):
    return h, ctx


def test_the_context_tells_positions_mask_and_segments():
    mask = np.array([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], bool)
    segment_ids = np.array([[7, 7, 3, 3, 7, 7], [1, 1, 1, 1, 1, 2]])
    ctx = run(PARAMS, CONFIG, TOKENS, mask=mask, segment_ids=segment_ids, tap=Tap(read_context), stop_after=0).taps
    np.testing.assert_array_equal(ctx.mask[0], mask)
    np.testing.assert_array_equal(ctx.positions[0][mask], [0, 1, 0, 1, 0, 0, 1, 2, 0])
    np.testing.assert_array_equal(ctx.segment_ids[0][mask], [0, 0, 1, 1, 2, 0, 0, 0, 1])
    np.testing.assert_array_equal(ctx.prompt_lengths[0][mask], [2, 2, 2, 2, 1, 3, 3, 3, 1])


def test_the_context_tells_prompts_from_what_was_generated():
    cache, lengths = init_cache(CONFIG, 2, 6), jnp.array([4, 2])
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]], bool)
    enter = partial(run, PARAMS, CONFIG, cache=cache, tap=Tap(read_context))
    prompt = enter(TOKENS[:, :4], mask=mask)
    np.testing.assert_array_equal(prompt.taps.prompt_lengths[0][mask], [4, 4, 4, 4, 2, 2])
    out = enter(TOKENS[:, 4:5], cache=prompt.cache, prompt_lengths=lengths)
    np.testing.assert_array_equal(out.taps.prompt_lengths[0], lengths[:, None])
    np.testing.assert_array_equal(out.taps.positions[0], lengths[:, None])
    given = jnp.array([[2, 2, 2, 2, 1, 1], [3, 3, 3, 3, 3, 3]])
    out = run(PARAMS, CONFIG, TOKENS, tap=Tap(read_context), stop_after=0, prompt_lengths=given)
    np.testing.assert_array_equal(out.taps.prompt_lengths[0], given)
    with pytest.raises(ValueError, match=r"prompt_lengths has shape \(3,\); expected \(2,\) or \(2, 6\)"):
        forward(PARAMS, CONFIG, TOKENS, prompt_lengths=jnp.ones(3, int))


def test_another_strength_layer_direction_or_equal_function_never_recompiles():
    traces = []

    @jax.jit
    def counted(params, tap):
        traces.append(1)
        return forward(params, CONFIG, TOKENS, tap=tap, logits="none").hidden

    other = jax.tree.map(lambda a: a + 1, PARAMS)
    for strength, layer, params in ((1.0, 0, PARAMS), (2.0, 3, PARAMS), (0.0, 1, other)):
        steer = Tap(add, jnp.zeros(4).at[layer].set(strength), jnp.full(16, strength))
        counted(params, chain(steer, Tap(Scale(1.5))))  # chain and Scale are made anew each time
    assert len(traces) == 1
    counted(PARAMS, chain(steer, Tap(Scale(2.5))))  # a frozen dataclass of another value is another program
    assert len(traces) == 2


def test_many_strengths_run_at_once_under_vmap(plain):
    strengths = jnp.array([0.0, 1.0, -2.0])
    make = lambda s: Tap(add, jnp.zeros(4).at[1].set(s), jnp.ones(16))  # noqa: E731
    each = lambda s: forward(PARAMS, CONFIG, TOKENS, tap=make(s), capture=ALL, logits="none").captured  # noqa: E731
    together = jax.jit(jax.vmap(each))(strengths)
    np.testing.assert_allclose(together[0], plain.captured, rtol=1e-5, atol=1e-5)
    for row, strength in zip(together, strengths, strict=True):
        np.testing.assert_allclose(row[1], plain.captured[1] + strength, rtol=1e-5, atol=1e-5)


def read_one_layer(h, chosen, direction, ctx):
    # The small output that replaces `captured` where gradients are wanted.
    return h, jnp.where(chosen, jnp.sum(h @ direction), 0.0)


def test_the_gradient_of_a_read_out_does_not_depend_on_remat():
    def loss(params, remat):
        tap = Tap(read_one_layer, jnp.arange(4) == 2, jnp.arange(16.0))
        return forward(params, CONFIG, TOKENS, tap=tap, logits="none", remat=remat).taps.sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    expected, found = grad(PARAMS, None), grad(PARAMS, "full")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), found, expected)
    norms = jax.tree.map(lambda a: np.linalg.norm(np.asarray(a)[:3].ravel()), expected["period"][0])
    assert all(0 < norm < np.inf for norm in jax.tree.leaves(norms))
    # Layer 3 comes after the read-out.
    assert all(not np.any(leaf[3]) for leaf in jax.tree.leaves(expected["period"][0]))


def test_per_layer_data_must_lead_with_the_layers():
    with pytest.raises(ValueError, match=r"tap.per_layer\['b'\] has shape \(3, 2\); its first axis must be the 4"):
        check_tap(Tap(leave, {"a": jnp.ones((4, 2)), "b": jnp.ones((3, 2))}), 4)
    with pytest.raises(ValueError, match=r"tap.per_layer has shape \(\)"):
        forward(PARAMS, CONFIG, TOKENS, tap=Tap(leave, 1.0))
    check_tap(Tap(leave, (jnp.ones(4), np.ones((4, 1)))), 4)


def test_a_function_that_cannot_be_static_is_refused_where_the_tap_is_made():
    @dataclass  # not frozen: no hash
    class Mutable:
        by: float

        def __call__(self, h, per_layer, shared, ctx):
            return h, ()

    with pytest.raises(TypeError, match="unhashable"):
        Tap(Mutable(1.0))
