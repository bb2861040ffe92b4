"""The forms of topk_encode for GPUs: what follows the matmul for any data, and the Hopper matmul simulated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qscope_kernels.dispatch import Device
from qscope_kernels.topk_encode import cuda, gpu
from qscope_kernels.topk_encode.gpu_matmul import GROUP, Tiling, matmul_maxima

D, F = 64, 256
H200 = Device("gpu", "NVIDIA H200", 132)
SMALL = Tiling(columns=64, stages=3, cluster=1, panel=2)
# JAX 0.10 simulates no clusters.
TILINGS = [SMALL, *([SMALL._replace(cluster=2)] if jax.__version_info__ >= (0, 11) else [])]
largest = jax.jit(cuda.largest, static_argnames="k")


def arrays(n, *, f=F, dtype=jnp.bfloat16):
    """Small integers: every product and sum is exact, and ties abound."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.integers(-3, 4, shape), dtype) for shape in ((n, D), (D, f), (f,))]


def pre_activations(x, w, b):
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(b, np.float64)


def check(found, pre, k):
    """The k largest values, sorted, and at their indices; ties may go to any."""
    values, indices = map(np.asarray, found)
    assert (values.shape, indices.dtype) == ((len(pre), k), np.int32)
    np.testing.assert_array_equal(values, np.maximum(np.sort(pre, axis=1)[:, ::-1][:, :k], 0))
    np.testing.assert_array_equal(np.maximum(np.take_along_axis(pre, indices, axis=1), 0), values)
    assert all(len(set(row)) == k for row in indices)


def maxima(pre, width):
    return np.asarray(pre).reshape(len(pre), -1, width).max(axis=2)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_best_groups_hold_the_largest_values_whatever_they_are(data):
    number = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([3e38, np.inf, -np.inf]), st.floats(width=32))
    row = st.lists(number.filter(lambda v: v == v and (v == 0 or abs(v) > 1e-30)), min_size=24, max_size=24)
    pre = np.array([data.draw(row)], np.float32)
    k = data.draw(st.integers(1, 6))
    check(largest(pre, maxima(pre, 4), k=k), pre, k)


@pytest.mark.parametrize("k", [1, 5, 16], ids=["k=1", "k=5", "k=all groups"])
def test_all_of_a_row_in_one_group_or_each_in_its_own(k):
    pre = np.zeros((2, 16 * 32), np.float32)
    pre[0, 64:96] = pre[1, ::16] = np.arange(1, 33)
    check(largest(pre, maxima(pre, 32), k=k), pre, k)


@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_a_nan_is_never_hidden(nan):
    pre = np.arange(64, dtype=np.float32)[None]
    pre[0, 9] = nan
    with np.errstate(invalid="ignore"):
        values, indices = largest(pre, maxima(pre, 8), k=2)
    np.testing.assert_array_equal(values, [[np.nan, 63]])
    np.testing.assert_array_equal(indices, [[9, 63]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("contract", ["exact", "fast"])
def test_the_form_for_any_cuda_device_equals_a_sort_also_in_chunks(monkeypatch, dtype, contract):
    monkeypatch.setattr(cuda, "CHUNK_ELEMENTS", 3 * 1024)
    x, w, b = arrays(7, f=1024, dtype=dtype)
    check(cuda.topk_encode(x, w, b, k=4, contract=contract), pre_activations(x, w, b), 4)


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: f"cluster of {tiling.cluster}")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_matmul_stores_pre_activations_and_the_maxima_of_their_groups(simulated_gpu, tiling, dtype):
    x, w, b = arrays(256)
    b = b.at[77].set(jnp.nan).at[140].set(jnp.inf).at[200].set(-jnp.inf)
    pre, found = matmul_maxima(x, w, b, cores=2, dtype=jnp.dtype(dtype), tiling=tiling)
    expected = jnp.asarray(pre_activations(x, w, b), jnp.float32).astype(dtype)
    expected = np.asarray(expected, np.float32)
    np.testing.assert_array_equal(np.asarray(pre, np.float32), expected)
    np.testing.assert_array_equal(found.T, maxima(expected, GROUP))


@pytest.mark.slow
@pytest.mark.parametrize("contract", ["exact", "fast"])
def test_the_hopper_form_equals_a_sort_where_tiles_do_not_divide_the_rows(simulated_gpu, contract):
    x, w, b = arrays(100)
    expected = np.asarray(jnp.asarray(pre_activations(x, w, b), jnp.float32), np.float32)
    if contract == "fast":
        expected = np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float32)
    check(gpu.topk_encode(x, w, b, k=8, contract=contract, tiling=SMALL), expected, 8)


def test_what_they_cannot_serve_they_name():
    def why(form=gpu, n=256, d=128, f=2048, k=50, dtype=jnp.bfloat16, device=H200):
        shapes = (n, d), (d, f), (f,)
        return form.unsuited(device, *(jax.ShapeDtypeStruct(s, dtype) for s in shapes), k=k, contract="exact")

    assert why() is None
    assert why(cuda) is None
    assert "made for Hopper" in why(device=Device("gpu", "NVIDIA A100"))
    assert "not float32, float32 and float32" in why(dtype=jnp.float32)
    assert "not 100 and 2048" in why(d=100)
    assert "not 128 and 2000" in why(f=2000)
    assert "k = 65 exceeds 64" in why(k=65)
    assert "2001 latents are not in groups of 8" in why(cuda, f=2001)
