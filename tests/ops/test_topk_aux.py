"""topk_encode_aux gives about the k largest among dead latents, and never a live one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qscope_kernels.topk_encode import topk_encode, xla
from qscope_kernels.topk_encode.auxk import bin_width, topk_encode_aux
from qscope_kernels.topk_encode.ref import pre_activations

D, F, K = 8, 4096, 64
encode = jax.jit(topk_encode_aux, static_argnames="k")


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return draw(200, D), draw(D, F), draw(F), jnp.asarray(rng.random(F) < 0.25)


def exact(x, w_enc, b_enc, dead, *, k):
    return topk_encode(x, w_enc, jnp.where(dead, b_enc, -jnp.inf), k=k)


def check(found, arrays):
    """Dead latents only, none twice, each with its own pre-activation, in order."""
    values, indices = map(np.asarray, found)
    pre = np.asarray(pre_activations(*arrays[:3]))
    used = values > 0
    assert np.asarray(arrays[3])[indices[used]].all()
    np.testing.assert_allclose(values[used], np.take_along_axis(pre, indices, axis=1)[used], rtol=1e-5)
    assert (np.diff(values, axis=1) <= 0).all()
    for row, mine in zip(indices, used, strict=True):
        assert len(set(row[mine].tolist())) == mine.sum()
    assert ((indices >= 0) & (indices < pre.shape[1])).all()


def test_the_recall_is_the_one_stated(arrays):
    width = bin_width(F, K)
    bins = F // width
    assert bins == 4 * K
    found = encode(*arrays, k=K)
    check(found, arrays)
    best = exact(*arrays, k=K)[1]
    recall = [len({*mine} & {*true}) / K for mine, true in zip(found[1].tolist(), best.tolist(), strict=True)]
    stated = bins / K * (1 - (1 - 1 / bins) ** K)
    # A row's recall scatters by about 0.03, rows share their latents: 200 of them by less than 0.01.
    assert abs(np.mean(recall) - stated) < 0.01
    assert 0.88 < stated < 0.89


def test_every_value_is_at_most_the_exact_one_and_the_largest_is_never_lost(arrays):
    found, best = encode(*arrays, k=K)[0], exact(*arrays, k=K)[0]
    assert (np.asarray(found) <= np.asarray(best)).all()
    np.testing.assert_array_equal(found[:, 0], best[:, 0])


@pytest.mark.parametrize("k", [300, F // 4, F])
def test_with_few_latents_per_slot_bins_shrink_until_nothing_is_lost(arrays, k):
    found = encode(*arrays, k=k)
    check(found, arrays)
    if bin_width(F, k) == 1:
        np.testing.assert_array_equal(found[0], exact(*arrays, k=k)[0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_fewer_dead_than_k_leave_zeros(data):
    f, k = 90, 6
    dead = np.array(data.draw(st.lists(st.booleans(), min_size=f, max_size=f)))
    dead[data.draw(st.integers(0, f)) :] = False
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, D), (D, f), (f,))]
    found = encode(*arrays, dead, k=k)
    check(found, (*arrays, dead))
    assert ((np.asarray(found[0]) > 0).sum(axis=1) <= dead.sum()).all()


def test_live_latents_stay_out_even_where_they_are_infinite_or_nan():
    w = jnp.zeros((D, 40)).at[:, 3].set(jnp.inf).at[:, 4].set(jnp.nan)
    values, indices = encode(jnp.ones((2, D)), w, jnp.ones(40), jnp.arange(40) == 17, k=2)
    np.testing.assert_array_equal(values, [[1, 0]] * 2)
    np.testing.assert_array_equal(indices[:, 0], [17, 17])


def test_a_nan_of_a_dead_latent_is_not_hidden():
    values, indices = encode(
        jnp.ones((1, D)), jnp.ones((D, 40)), jnp.zeros(40).at[7].set(-jnp.nan), jnp.ones(40, bool), k=2
    )
    assert np.isnan(values[0, 0])
    assert indices[0, 0] == 7


def test_chunks_of_rows_change_nothing(arrays, monkeypatch):
    expected = encode(*arrays, k=K)
    monkeypatch.setattr(xla, "_CHUNK_ELEMENTS", 30 * F)
    found = topk_encode_aux(*arrays, k=K)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_gradient_is_that_of_the_latents_chosen(arrays):
    x, w, b, dead = (array[:5] if array.shape[0] == 200 else array for array in arrays)
    target = jnp.asarray(np.random.default_rng(1).normal(size=(5, K)), jnp.float32)

    def chosen(x, w, b):
        return jnp.sum(target * topk_encode_aux(x, w, b, dead, k=K)[0])

    def read(x, w, b):
        pre = jnp.matmul(x, w, precision="highest") + b
        return jnp.sum(target * jax.nn.relu(jnp.take_along_axis(pre, encode(x, w, b, dead, k=K)[1], axis=1)))

    for one, other in zip(*(jax.jit(jax.grad(f, argnums=(0, 1, 2)))(x, w, b) for f in (chosen, read)), strict=True):
        assert np.any(other)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_leading_axes_are_kept(arrays):
    values, indices = encode(arrays[0].reshape(2, 100, D), *arrays[1:], k=K)
    assert values.shape == indices.shape == (2, 100, K)


def test_memory_does_not_grow_with_the_tokens(monkeypatch):
    monkeypatch.setattr(xla, "_CHUNK_ELEMENTS", 16 * F)
    run = jax.jit(functools.partial(topk_encode_aux, k=K))
    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((512, D), "float32"), ((D, F), "float32"), ((F,), "float32"), ((F,), bool))
    ]
    assert run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 512 * F * 4 // 4


def test_what_does_not_fit_is_refused():
    x, w, b = jnp.zeros((2, 3)), jnp.zeros((3, 24)), jnp.zeros(24)
    with pytest.raises(ValueError, match=r"dead is float32 \(24,\); expected bool \(24,\)"):
        topk_encode_aux(x, w, b, jnp.zeros(24), k=2)
    with pytest.raises(ValueError, match=r"dead is bool \(23,\); expected bool \(24,\)"):
        topk_encode_aux(x, w, b, jnp.zeros(23, bool), k=2)
    with pytest.raises(ValueError, match=r"k = 25 does not lie in 1\.\.24"):
        topk_encode_aux(x, w, b, jnp.zeros(24, bool), k=25)
