"""Every implementation of sparse_outer adds values times rows, and values, to the latents that a code names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qscope_kernels.sparse_outer import _IMPLEMENTATIONS, sparse_outer

IMPLEMENTATIONS = sorted(_IMPLEMENTATIONS)
outer = jax.jit(sparse_outer, static_argnames=("latents", "impl"))
N, K, D, F = 5, 3, 4, 9
ROWS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


def oracle(values, indices, rows, latents):
    """In float64, slot by slot."""
    out, total = np.zeros((latents, rows.shape[1])), np.zeros(latents)
    for vs, js, row in zip(values, indices, np.asarray(rows, np.float64), strict=True):
        for v, j in zip(vs, js, strict=True):
            out[j] += v * row
            total[j] += v
    return out, total


def check(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_equals_a_loop_over_slots(impl, data):
    number, index = st.floats(-8, 8, width=32), st.integers(0, F - 1)
    values, indices = (
        np.array(data.draw(st.lists(st.lists(item, min_size=K, max_size=K), min_size=N, max_size=N)), dtype)
        for item, dtype in ((number, np.float32), (index, np.int32))
    )
    check(outer(values, indices, ROWS, latents=F, impl=impl), oracle(values, indices, ROWS, F))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_latent_that_every_slot_names(impl):
    values, indices = np.ones((N, K), np.float32), np.full((N, K), F - 1, np.int32)
    check(outer(values, indices, ROWS, latents=F, impl=impl), oracle(values, indices, ROWS, F))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_index_beyond_counts_as_the_nearest(impl):
    values = np.array([[1, 2, 4]] * N, np.float32)
    indices = np.array([[-1, F, -(2**31)]] * N, np.int32)
    check(outer(values, indices, ROWS, latents=F, impl=impl), oracle(values, np.clip(indices, 0, F - 1), ROWS, F))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_are_summed_in_float32(impl, dtype):
    # 1 + 2^-12 + ... would stay 1 in either.
    n = 64
    values = jnp.full((n, 1), 2.0**-6, dtype).at[0].set(1)
    rows = jnp.full((n, D), 2.0**-6, dtype).at[0].set(1)
    out, total = outer(values, jnp.zeros((n, 1), int), rows, latents=2, impl=impl)
    np.testing.assert_array_equal(out, [[1 + 63 / 4096] * D, [0] * D])
    np.testing.assert_array_equal(total, [1 + 63 / 64, 0])
    assert out.dtype == total.dtype == jnp.float32


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(impl, n):
    values, indices = np.ones((n, K), np.float32), np.zeros((n, K), np.int32)
    found = outer(values, indices, ROWS[:n], latents=F, impl=impl)
    check(found, oracle(values, indices, ROWS[:n], F))


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "ref"])
def test_gradients_equal_those_of_the_definition(impl):
    rng = np.random.default_rng(1)
    values, indices = jnp.asarray(rng.normal(size=(N, K)), jnp.float32), rng.integers(-2, F + 2, (N, K))

    def loss(values, rows, impl):
        sums, totals = sparse_outer(values, indices, rows, latents=F, impl=impl)
        return jnp.sum(sums**2) + jnp.sum(totals**3)

    expected, found = (jax.grad(loss, argnums=(0, 1))(values, jnp.asarray(ROWS), i) for i in ("ref", impl))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_indices_too_narrow_for_the_number_of_latents(impl):
    values, indices = np.ones((N, K), np.float32), np.full((N, K), 100, np.int8)
    found, total = outer(values, indices, ROWS, latents=1000, impl=impl)
    np.testing.assert_allclose(found[100], K * ROWS.sum(0), rtol=1e-5)
    assert total[100] == total.sum() == N * K


def test_no_product_per_slot_is_kept():
    n, k, d, f = 64, 32, 128, 256
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((n, k), "float32"), ((n, k), "int32"), ((n, d), "float32"))]
    memory = outer.lower(*shapes, latents=f, impl="xla").compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * k * d * 4 // 4


def test_what_does_not_fit_is_refused_with_what_was_expected():
    values, indices, rows = jnp.zeros((2, 3)), jnp.zeros((2, 3), int), jnp.zeros((2, 4))
    wrong = [
        (values[:1], indices, rows),
        (values, indices[:, :2], rows),
        (values, indices, rows[:1]),
        (values[0], indices[0], rows[0]),
    ]
    for arrays in wrong:
        with pytest.raises(ValueError, match=r"do not fit; expected \[n, k\] twice and \[n, d\]"):
            sparse_outer(*arrays, latents=5)
    with pytest.raises(ValueError, match="indices are float32; expected an integer dtype"):
        sparse_outer(values, values, rows, latents=5)
    with pytest.raises(ValueError, match="values are int32; expected a floating dtype"):
        sparse_outer(indices, indices, rows, latents=5)
    with pytest.raises(ValueError, match="rows are int32; expected a floating dtype"):
        sparse_outer(values, indices, indices, latents=5)
    with pytest.raises(ValueError, match="latents = 0; expected at least 1"):
        sparse_outer(values, indices, rows, latents=0)


def test_unknown_names_are_refused_with_the_known_ones():
    arrays = jnp.zeros((2, 3)), jnp.zeros((2, 3), int), jnp.zeros((2, 4))
    with pytest.raises(ValueError, match=r"sparse_outer has no implementation 'tpu9'; there are \[.*'ref', .*'xla'\]"):
        sparse_outer(*arrays, latents=5, impl="tpu9")


def test_outside_jit_a_second_call_compiles_nothing(compilations):
    values, indices = jnp.ones((4, 3)), jnp.zeros((4, 3), int)
    first, second = (jnp.asarray(np.random.default_rng(seed).normal(size=(4, 5)), jnp.float32) for seed in (0, 1))
    sparse_outer(values, indices, first, latents=7, impl="xla")
    with compilations() as seen:
        sparse_outer(values, indices, second, latents=7, impl="xla")
    assert not seen
