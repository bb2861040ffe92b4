"""Every implementation of sparse_decode adds the decoder rows that a code names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qscope_kernels.sparse_decode import _IMPLEMENTATIONS, gather_dot, sparse_decode, xla

IMPLEMENTATIONS = sorted(_IMPLEMENTATIONS)
decode = jax.jit(sparse_decode, static_argnames="impl")
dot = jax.jit(gather_dot, static_argnames="impl")
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


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "ref"])
def test_gradients_of_products_and_of_gradients_equal_those_of_the_definition(impl):
    rng = np.random.default_rng(3)
    indices, w = rng.integers(-2, F + 2, (6, K)), jnp.asarray(W_DEC)
    values, rows, target = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, K), (6, D), (6, K)))

    def decoded(v, w, impl):
        return jnp.sum(sparse_decode(v, indices, w, impl=impl) ** 3)

    losses = {
        "dot": lambda x, w, impl: jnp.sum(target * gather_dot(x, indices, w, impl=impl) ** 2),
        "slope": lambda v, w, impl: sum(jnp.sum(g**2) for g in jax.grad(decoded, argnums=(0, 1))(v, w, impl)),
    }
    for (name, loss), first in zip(losses.items(), (rows, values), strict=True):
        expected, found = (jax.grad(loss, argnums=(0, 1))(first, w, i) for i in ("ref", impl))
        for one, other in zip(found, expected, strict=True):
            assert np.any(other), name
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(other))))


@pytest.mark.parametrize("k", [1, 9, 10, 11, 25])
def test_any_number_of_slots(k):
    """Groups of ten and what they leave over."""
    rng = np.random.default_rng(k)
    values, indices = rng.normal(size=(3, k)).astype(np.float32), rng.integers(0, F, (3, k))
    np.testing.assert_allclose(
        decode(values, indices, W_DEC, impl="xla"), oracle(values, indices), rtol=1e-5, atol=1e-5
    )


def shapes(n, k, d, f, dtype):
    return [jax.ShapeDtypeStruct(s, t) for s, t in (((n, k), "float32"), ((n, k), "int32"), ((f, d), dtype))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_row_per_slot_exists_and_no_wide_copy_of_the_weights(dtype, monkeypatch):
    n, k, d, f = 64, 40, 128, 8192
    monkeypatch.setattr(xla, "_BLOCK_ELEMENTS", 8 * k * d)
    values, indices, w = shapes(n, k, d, f, dtype)
    rows = jax.ShapeDtypeStruct((n, d), jnp.float32)
    for compiled in (
        jax.jit(lambda *a: sparse_decode(*a, impl="xla")).lower(values, indices, w).compile(),
        jax.jit(lambda *a: gather_dot(*a, impl="xla")).lower(rows, indices, w).compile(),
    ):
        assert compiled.memory_analysis().temp_size_in_bytes < n * k * d * 4 // 4 < f * d * 4 // 4


def test_the_backward_pass_keeps_no_row_per_slot(monkeypatch):
    n, k, d, f = 64, 32, 128, 256
    monkeypatch.setattr(xla, "_BLOCK_ELEMENTS", 8 * k * d)
    loss = lambda v, i, w: jnp.sum(sparse_decode(v, i, w, impl="xla") ** 2)  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(*shapes(n, k, d, f, "float32")).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * k * d * 4 // 2


def test_what_no_gradient_asks_for_is_not_computed():
    n, k, d, f = 6, 3, 5, 77
    target = jnp.ones((n, d))

    def compiled(argument):
        loss = lambda v, i, w: jnp.sum(target * sparse_decode(v, i, w, impl="xla"))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=argument)).lower(*shapes(n, k, d, f, "float32")).compile()

    of_values, of_weights = compiled(0), compiled(2)
    # The sum over latents is in one alone, the weights are read by the other alone: unread arguments are dropped.
    assert ("scatter" in of_weights.as_text(), "scatter" in of_values.as_text()) == (True, False)
    sizes = [text.memory_analysis().argument_size_in_bytes for text in (of_values, of_weights)]
    assert sizes == [4 * (n * k + f * d), 4 * 2 * n * k]


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_cotangents_have_the_types_of_what_they_belong_to(dtypes):
    arrays = jnp.ones((2, K), dtypes[0]), jnp.ones((F, D), dtypes[1])
    loss = lambda v, w: jnp.sum(sparse_decode(v, jnp.zeros((2, K), int), w, impl="xla"))  # noqa: E731
    found = jax.grad(loss, argnums=(0, 1))(*arrays)
    assert tuple(part.dtype.name for part in found) == dtypes
    np.testing.assert_array_equal(found[0], np.full((2, K), D))
    np.testing.assert_array_equal(found[1][0], np.full(D, 2 * K))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_gather_dot_multiplies_rows_with_those_named(impl, dtype, n, monkeypatch):
    monkeypatch.setattr(xla, "_BLOCK_ELEMENTS", 3 * K * D)  # blocks of three tokens
    rng = np.random.default_rng(n)
    rows, w = jnp.asarray(rng.normal(size=(n, D)), dtype), jnp.asarray(W_DEC, dtype)
    indices = rng.integers(-3, F + 3, (n, K))  # beyond the latents: the nearest
    expected = np.einsum("nd,nad->na", np.asarray(rows, float), np.asarray(w, float)[np.clip(indices, 0, F - 1)])
    found = gather_dot(rows, indices, w, impl=impl)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_with_what_was_expected():
    values, indices, rows = jnp.zeros((2, 3)), jnp.zeros((2, 3), int), jnp.zeros((2, D))
    with pytest.raises(ValueError, match="indices are float32; expected an integer dtype"):
        sparse_decode(values, values, W_DEC)
    with pytest.raises(ValueError, match="values are int32; expected a floating dtype"):
        sparse_decode(indices, indices, W_DEC)
    with pytest.raises(ValueError, match=r"w_dec is int32 \(12, 5\); expected floating \[f, d\]"):
        sparse_decode(values, indices, W_DEC.astype(int))
    with pytest.raises(ValueError, match=r"w_dec is float32 \(5,\); expected floating \[f, d\]"):
        sparse_decode(values, indices, W_DEC[0])
    with pytest.raises(ValueError, match="indices are float32; expected an integer dtype"):
        gather_dot(rows, values, W_DEC)
    for wrong in ((rows[:1], indices), (rows[:, :4], indices), (rows, indices[0]), (rows[0], indices)):
        with pytest.raises(ValueError, match=r"do not fit; expected \[n, d\], \[n, k\] and \[f, d\]"):
            gather_dot(*wrong, W_DEC)


def test_no_slot_at_all():
    none = jnp.zeros((2, 0))
    with pytest.raises(ValueError, match=r"values \(2, 0\) .* must have one shape, \[..., k\], k > 0"):
        sparse_decode(none, none.astype(int), W_DEC)
    assert gather_dot(jnp.ones((2, D)), none.astype(int), W_DEC).shape == (2, 0)


def test_values_and_indices_have_one_shape():
    with pytest.raises(ValueError, match=r"values \(2, 3\) and indices \(2, 4\) must have one shape"):
        sparse_decode(jnp.zeros((2, 3)), jnp.zeros((2, 4), int), W_DEC)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"sparse_decode has no implementation 'tpu9'; there are \[.*'ref', .*'xla'\]"):
        sparse_decode(jnp.zeros((2, 3)), jnp.zeros((2, 3), int), W_DEC, impl="tpu9")


def test_outside_jit_a_second_call_compiles_nothing(compilations):
    values, indices = jnp.ones((2, 13)), jnp.zeros((2, 13), int)
    first, second = (jnp.asarray(np.random.default_rng(seed).normal(size=(F, D)), jnp.float32) for seed in (0, 1))
    sparse_decode(values, indices, first, impl="xla")
    with compilations() as seen:
        sparse_decode(values, indices, second, impl="xla")
    assert not seen
