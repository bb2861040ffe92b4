"""The PTX that the Hopper kernels of the sparse operations become, run by an interpreter, against the definitions."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from qscope_kernels.sparse_decode import gpu as decode_gpu
from qscope_kernels.sparse_decode import ref as decode_ref
from qscope_kernels.sparse_outer import gpu as outer_gpu
from qscope_kernels.sparse_outer import ref as outer_ref
from qscope_kernels.sparse_outer.order import order

pytestmark = pytest.mark.aot
F = 12
bfloat16 = np.dtype(jnp.bfloat16)


@pytest.fixture(scope="module")
def ptx():
    spec = importlib.util.spec_from_file_location("ptx", Path(__file__).with_name("ptx.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def texts(ptx, h200s, compiled, capfd, monkeypatch):
    """A function of a function and its arrays to the PTX of its kernels, those with fewer arrays first."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")

    def compile(function, *arrays):
        capfd.readouterr()
        compiled(h200s(1), function, *((array.shape, array.dtype) for array in arrays))
        found = ptx.modules("".join(capfd.readouterr()))
        return sorted(found, key=lambda text: text.count("_param_"))

    return compile


def code(n, k, seed=0):
    """Values and indices [n, k]; some indices lie beyond the latents, and latent 3 is in every token."""
    rng = np.random.default_rng(seed)
    values, indices = rng.normal(size=(n, k)).astype(np.float32), rng.integers(-2, F + 2, (n, k), dtype=np.int32)
    indices[:, 0] = 3
    return values, indices


def matrix(rows, d, dtype, seed=1):
    return np.random.default_rng(seed).normal(size=(rows, d)).astype(dtype)


def empty(*shape):
    return np.full(shape, np.nan, np.float32)


def bytes_per_row(kernel, name="ld.global"):
    """How many bytes a block's threads read or write with 16-byte accesses."""
    return 128 * 16 * sum(count for access, count in kernel.instructions.items() if access == f"{name}.v4.b32")


@pytest.mark.parametrize(
    ("d", "dtype"), [(2048, bfloat16), (5120, bfloat16), (4096, np.float32), (384, bfloat16)], ids=str
)
def test_decode(ptx, texts, d, dtype):
    n, k = 2, 7
    values, indices = code(n, k)
    w, out = matrix(F, d, dtype), empty(n, d)
    (text,) = texts(decode_gpu.sparse_decode, values, indices, w)
    kernel = ptx.Kernel(text, indices, values, w, out)
    kernel.run(n * decode_gpu.in_parts(w, decode_gpu.COLUMNS).shape[1])
    np.testing.assert_allclose(out, decode_ref.sparse_decode(values, indices, jnp.asarray(w)), rtol=1e-5, atol=1e-5)
    if d % 1024 == 0:
        columns = decode_gpu.in_parts(w, decode_gpu.COLUMNS).shape[2]
        assert bytes_per_row(kernel) == decode_gpu.UNROLL * columns * w.itemsize
        assert bytes_per_row(kernel, "st.global") == columns * out.itemsize


@pytest.mark.parametrize(("d", "dtype"), [(2048, bfloat16), (5120, np.float32)], ids=str)
def test_gather_dot(ptx, texts, d, dtype):
    n, k = 2, 7
    _, indices = code(n, k)
    rows, w, out = matrix(n, d, np.float32, seed=2), matrix(F, d, dtype), empty(n, k)
    (text,) = texts(decode_gpu.gather_dot, rows, indices, w)
    kernel = ptx.Kernel(text, rows, indices, w, out)
    kernel.run(n)
    np.testing.assert_allclose(out, decode_ref.gather_dot(rows, indices, jnp.asarray(w)), rtol=1e-5, atol=2e-4)
    # Seven slots: a group and what is left of the next, and the token's own row.
    assert bytes_per_row(kernel) == k * d * w.itemsize + d * rows.itemsize


@pytest.mark.parametrize(("d", "dtype", "piece"), [(2048, bfloat16, 128), (640, np.float32, 32)], ids=str)
def test_sparse_outer(ptx, texts, d, dtype, piece):
    n, k = 96, 5
    values, indices = code(n, k)
    indices[np.random.default_rng(3).random((n, k)) < 0.6] = 3  # whole pieces in this run, none in others
    rows = matrix(n, d, dtype)
    both = lambda *arrays: outer_gpu.sparse_outer(*arrays, latents=F, piece=piece)  # noqa: E731
    of_pieces, of_runs = texts(both, values, indices, rows)

    latents, slots, starts = (np.array(array) for array in order(jnp.asarray(indices), F))
    weights, tokens = values.reshape(-1)[slots], slots // k
    parts, columns = outer_gpu.in_parts(rows, outer_gpu.ROW_BYTES // rows.itemsize).shape[1:]
    sums, totals = empty(parts, n * k // piece, columns), empty(n * k // piece)
    ptx.Kernel(of_pieces, latents, tokens, weights, rows, sums, totals).run(parts * len(totals))
    assert np.isfinite(totals).any()
    assert np.isnan(totals).any()

    out, amounts = empty(F, d), empty(F)
    kernel = ptx.Kernel(of_runs, starts, tokens, weights, rows, totals, sums, out, amounts)
    kernel.run(parts * F)
    expected = outer_ref.sparse_outer(values, indices, jnp.asarray(rows), latents=F)
    for one, other in zip((out, amounts), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
    if d == 2048:
        assert bytes_per_row(kernel, "st.global") == columns * out.itemsize
