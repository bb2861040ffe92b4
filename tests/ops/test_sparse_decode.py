"""Every implementation of sparse_decode adds the decoder rows that a code names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qscope_kernels.sparse_decode import _IMPLEMENTATIONS, sparse_decode

IMPLEMENTATIONS = sorted(_IMPLEMENTATIONS)
decode = jax.jit(sparse_decode, static_argnames="impl")
F, D, K = 12, 5, 4
W_DEC = np.random.default_rng(0).normal(size=(F, D)).astype(np.float32)


def oracle(values, indices, w_dec=W_DEC):
    """The dense form in float64: repeated indices add up."""
    dense = np.zeros((len(values), F))
    for row, (vs, js) in enumerate(zip(values, indices, strict=True)):
        for v, j in zip(vs, js, strict=True):
            if v:
                dense[row, j] += v
    return dense @ np.asarray(w_dec, np.float64)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_equals_the_dense_product(impl, data):
    number = st.floats(-8, 8, width=32)
    values = np.array(data.draw(st.lists(st.lists(number, min_size=K, max_size=K), min_size=3, max_size=3)), np.float32)
    index = st.lists(st.lists(st.integers(0, F - 1), min_size=K, max_size=K), min_size=3, max_size=3)
    indices = np.array(data.draw(index), np.int32)
    np.testing.assert_allclose(decode(values, indices, W_DEC, impl=impl), oracle(values, indices), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_unused_slot_adds_nothing_whatever_its_index(impl):
    values = np.array([[2.0, 0.0, 0.0, 0.0]], np.float32)
    for unused in (0, 3, F, 2**31 - 1, -1, -(2**31)):
        indices = np.array([[3, unused, unused, unused]], np.int32)
        np.testing.assert_array_equal(decode(values, indices, W_DEC, impl=impl), 2 * W_DEC[3:4])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_empty_code_decodes_to_zero(impl):
    out = decode(np.zeros((2, K), np.float32), np.full((2, K), 7), W_DEC, impl=impl)
    np.testing.assert_array_equal(out, np.zeros((2, D)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_summed_in_float32(impl, dtype):
    w_dec = jnp.asarray(W_DEC, dtype)
    values, indices = np.full((1, K), 1 / 3, np.float32), np.array([[0, 5, 7, 11]])
    out = decode(values, indices, w_dec, impl=impl)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, oracle(values, indices, w_dec.astype(jnp.float32)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 3, K), (2, 3, 1)], ids=str)
def test_leading_axes_are_kept(impl, shape):
    values, indices = np.ones(shape, np.float32), np.random.default_rng(1).integers(0, F, shape)
    out = decode(values, indices, W_DEC, impl=impl)
    assert out.shape == (*shape[:-1], D)
    np.testing.assert_allclose(out, W_DEC[indices].sum(axis=-2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "ref"])
def test_gradients_equal_those_of_the_definition(impl):
    rng = np.random.default_rng(2)
    values = jnp.asarray(rng.normal(size=(6, K)), jnp.float32).at[0, 1].set(0)
    indices, target = rng.integers(0, F, (6, K)), rng.normal(size=(6, D)).astype(np.float32)
    loss = lambda v, w, impl: jnp.sum(target * sparse_decode(v, indices, w, impl=impl) ** 2)  # noqa: E731
    expected, found = (jax.grad(loss, argnums=(0, 1))(values, jnp.asarray(W_DEC), name) for name in ("ref", impl))
    for one, other in zip(found, expected, strict=True):
        assert np.any(other)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_keeps_no_row_per_slot():
    n, k, d, f = 64, 32, 128, 256
    loss = lambda v, w: jnp.sum(sparse_decode(v, jnp.zeros((n, k), int), w, impl="xla") ** 2)  # noqa: E731
    shapes = jax.ShapeDtypeStruct((n, k), jnp.float32), jax.ShapeDtypeStruct((f, d), jnp.float32)
    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * k * d * 4 // 2


def test_values_and_indices_have_one_shape():
    with pytest.raises(ValueError, match=r"values \(2, 3\) and indices \(2, 4\) must have one shape"):
        sparse_decode(jnp.zeros((2, 3)), jnp.zeros((2, 4), int), W_DEC)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"sparse_decode has no implementation 'tpu9'; there are \['ref', 'xla'\]"):
        sparse_decode(jnp.zeros((2, 3)), jnp.zeros((2, 3), int), W_DEC, impl="tpu9")
