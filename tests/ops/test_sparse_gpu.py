"""The Hopper forms of sparse_decode and sparse_outer, simulated, against the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qscope_kernels.dispatch import Device
from qscope_kernels.pallas_gpu import plgpu
from qscope_kernels.sparse_decode import gpu as decode_gpu
from qscope_kernels.sparse_decode import ref as decode_ref
from qscope_kernels.sparse_outer import gpu as outer_gpu
from qscope_kernels.sparse_outer import ref as outer_ref
from qscope_kernels.sparse_outer import xla as outer_xla
from qscope_kernels.sparse_outer.order import order

H200 = Device("gpu", "NVIDIA H200")
F, D = 16, 256


def many(n, k):
    """A code too large to make, as shapes."""
    return jax.ShapeDtypeStruct((n, k), jnp.float32), jax.ShapeDtypeStruct((n, k), jnp.int32)


@pytest.fixture
def simulated(simulated_gpu, monkeypatch):
    """As `simulated_gpu`; that of JAX 0.10 knows no layouts, on which no result depends."""
    if jax.__version_info__ < (0, 11):
        monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)


def code(n, k, *, f=F, seed=0, low=-2, high=2):
    """Values and indices [n, k], some of them repeated, unused or beyond the f latents."""
    rng = np.random.default_rng(seed)
    values, indices = rng.normal(size=(n, k)).astype(np.float32), rng.integers(low, f + high, (n, k), dtype=np.int32)
    values[rng.random((n, k)) < 0.2] = 0
    if k > 1:
        indices[0, 1] = indices[0, 0]
    return jnp.asarray(values), jnp.asarray(indices)


def matrix(rows, d=D, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, d)), dtype)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("k", "unroll", "dtype"), [(6, 3, "bfloat16"), (7, 3, "float32"), (2, 5, "float16"), (1, 1, "bfloat16")]
)
def test_decode_equals_the_definition(simulated, k, unroll, dtype):
    values, indices = code(3, k)
    w = matrix(F, dtype=dtype)
    found = decode_gpu.sparse_decode(values, indices, w, columns=128, unroll=unroll)
    assert (found.dtype, found.shape) == (jnp.float32, (3, D))
    close(found, decode_ref.sparse_decode(values, indices, w))


def test_a_group_that_is_not_full_adds_its_last_row_once_even_if_it_is_infinite(simulated):
    values, indices = jnp.ones((1, 4)), jnp.asarray([[0, 1, 2, 3]], jnp.int32)
    w = matrix(F, 128).at[3].set(jnp.inf)
    np.testing.assert_array_equal(decode_gpu.sparse_decode(values, indices, w, unroll=3), jnp.full((1, 128), jnp.inf))


def test_decode_serves_widths_that_16_bytes_a_thread_do_not_divide(simulated):
    values, indices = code(2, 5)
    w = matrix(F, 384, "bfloat16")
    close(decode_gpu.sparse_decode(values, indices, w), decode_ref.sparse_decode(values, indices, w))


def test_narrow_values_are_read_as_float32(simulated):
    values, indices = code(2, 5)
    w, values = matrix(F), values.astype(jnp.bfloat16)
    close(decode_gpu.sparse_decode(values, indices, w), decode_ref.sparse_decode(values, indices, w))


def test_an_empty_code_decodes_to_zero_whatever_its_indices(simulated):
    indices = jnp.array([[0, -(2**31), 2**31 - 1]], jnp.int32)
    found = decode_gpu.sparse_decode(jnp.zeros((1, 3)), indices, matrix(F))
    np.testing.assert_array_equal(found, np.zeros((1, D)))


@pytest.mark.parametrize(("k", "unroll", "dtype"), [(6, 3, "bfloat16"), (7, 3, "float32"), (2, 5, "bfloat16")])
def test_gather_dot_is_the_gradient_of_the_decode_by_its_values(simulated, k, unroll, dtype):
    values, indices = code(3, k)
    w, rows = matrix(F, dtype=dtype), matrix(3, seed=2)
    found = decode_gpu.gather_dot(rows, indices, w, unroll=unroll)
    assert (found.dtype, found.shape) == (jnp.float32, (3, k))
    _, pull = jax.vjp(lambda v: decode_ref.sparse_decode(v, indices, w), values)
    np.testing.assert_allclose(found, pull(rows)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "k", "piece", "dtype"), [(9, 3, 8, "float32"), (9, 3, 4, "bfloat16"), (2, 3, 8, "float32")]
)
def test_outer_equals_the_definition(simulated, n, k, piece, dtype):
    # Latent 5 is empty, and the last one; latent 2 is active in every token, over several whole pieces.
    values, indices = code(n, k, f=7, high=0)
    indices = jnp.where(indices == 5, 4, indices).at[:, 0].set(2)
    rows = matrix(n, dtype=dtype)
    found = outer_gpu.sparse_outer(values, indices, rows, latents=8, row_bytes=512, piece=piece, unroll=3)
    expected = outer_ref.sparse_outer(values, indices, rows, latents=8)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        close(one, other)
        assert not np.any(one[5])
        assert not np.any(one[7])


def test_one_latent_may_have_every_slot(simulated):
    n, k, latent = 10, 3, 3
    values, _ = code(n, k)
    rows, indices = matrix(n), jnp.full((n, k), latent, jnp.int32)
    found = outer_gpu.sparse_outer(values, indices, rows, latents=4, piece=4, unroll=2)
    for one, other in zip(found, outer_ref.sparse_outer(values, indices, rows, latents=4), strict=True):
        close(one, other)
        assert np.flatnonzero(np.any(np.asarray(one).reshape(4, -1), axis=1)).tolist() == [latent]


@pytest.mark.slow
def test_pieces_are_counted_once_wherever_a_run_begins(simulated):
    """A run of 9, pieces of 4, begun at every offset; every entry is a power of two, so that none can hide."""
    values = 2.0 ** jnp.arange(20)
    outer = jax.jit(lambda *arrays: outer_gpu.sparse_outer(*arrays, latents=3, piece=4, unroll=2))
    for start in range(9):
        indices = jnp.repeat(jnp.arange(3), np.array([start, 9, 11 - start]))
        _, found = outer(values[:, None], indices[:, None], jnp.ones((20, 128)))
        np.testing.assert_array_equal(found, [values[indices == latent].sum() for latent in range(3)])


def test_the_order_is_sorted_and_knows_where_each_latent_starts():
    _, indices = code(11, 5, f=6)
    found = order(indices, 6)
    clipped = np.clip(np.asarray(indices).reshape(-1), 0, 5)
    np.testing.assert_array_equal(found.slots, np.argsort(clipped, kind="stable"))
    np.testing.assert_array_equal(found.latents, np.sort(clipped))
    np.testing.assert_array_equal(np.diff(found.starts), np.bincount(clipped, minlength=6))
    assert (found.starts[0], found.starts[-1]) == (0, indices.size)


def test_two_products_of_one_code_sort_once():
    _, indices = code(11, 5)
    both = lambda a, b, i: (a.reshape(-1)[order(i, F).slots], b.reshape(-1)[order(i, F).slots])  # noqa: E731
    text = jax.jit(both).lower(indices * 1.0, indices * 2.0, indices).compile().as_text()
    assert text is not None
    assert text.count(" sort(") == 1


def test_kernels_say_what_they_cannot_serve():
    values, indices = code(3, 4)
    reasons = {
        "made for Hopper .* not for NVIDIA A100": decode_gpu.unsuited(
            Device("gpu", "NVIDIA A100"), values, indices, matrix(F)
        ),
        "d = 200 is no multiple of 128": decode_gpu.unsuited(H200, values, indices, matrix(F, 200)),
        r"vectors \[16777216, 256\]": decode_gpu.unsuited(H200, *many(1 << 24, 1), matrix(F)),
        "pieces of 2147483648 slots": outer_gpu.unsuited(H200, *many(1 << 25, 64), matrix(3), latents=F),
        "rows of int32": decode_gpu.unsuited(H200, values, indices, matrix(F, dtype="int32")),
        "values of int32": outer_gpu.unsuited(H200, indices, indices, matrix(3), latents=F),
        r"a gradient \[16777216, 256\]": outer_gpu.unsuited(H200, values, indices, matrix(3), latents=1 << 24),
        r"int32 indices \[0, 4\]": outer_gpu.unsuited(H200, values[:0], indices[:0], matrix(0), latents=F),
    }
    for pattern, reason in reasons.items():
        assert reason is not None
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(reason)
    assert decode_gpu.unsuited(H200, values, indices, matrix(F)) is None
    assert outer_gpu.unsuited(H200, values, indices, matrix(3, dtype="bfloat16"), latents=F) is None


def test_the_portable_outer_product_agrees():
    values, indices = code(11, 5)
    rows = matrix(11)
    found, expected = (form.sparse_outer(values, indices, rows, latents=F) for form in (outer_xla, outer_ref))
    for one, other in zip(found, expected, strict=True):
        close(one, other)
