"""The TPU kernels of the sparse operations, simulated, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qscope_kernels.dispatch import Device
from qscope_kernels.sparse_decode import ref as decode_ref
from qscope_kernels.sparse_decode import tpu as decode_tpu

V5E = Device("tpu", "TPU v5 lite")


def code(n, k, f, seed=0):
    """Values with unused slots, and indices that repeat within a token and lie outside 0..f-1 too."""
    rng = np.random.default_rng(seed)
    values, indices = rng.normal(size=(n, k)).astype(np.float32), rng.integers(-2, f + 2, (n, k)).astype(np.int32)
    values[rng.random((n, k)) < 0.2] = 0
    indices[:, 0] = indices[:, -1]
    indices[0, 0], indices[0, -1] = -(2**31), 2**31 - 1
    return jnp.asarray(values), jnp.asarray(indices)


def matrix(shape, dtype, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def products(rows, indices, w):
    """The definition of gather_dot, in float64."""
    w = np.asarray(w.astype(jnp.float32), np.float64)[np.clip(indices, 0, w.shape[0] - 1)]
    return np.einsum("nd,nkd->nk", np.asarray(rows.astype(jnp.float32), np.float64), w)


# More and fewer tokens than a step of the grid has, and numbers that no tile divides.
SHAPES = [(1, 9, 8, 1024), (67, 2, 24, 384)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_adds_the_rows_that_a_code_names(shape, dtype):
    n, k, f, d = shape
    (values, indices), w = code(n, k, f), matrix((f, d), dtype)
    assert decode_tpu.unsuited(V5E, values, indices, w) is None
    out = decode_tpu.sparse_decode(values, indices, w, interpret=True)
    assert (out.shape, out.dtype) == ((n, d), jnp.float32)
    np.testing.assert_allclose(out, decode_ref.sparse_decode(values, indices, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_dot_multiplies_rows_with_those_that_a_code_names(shape, dtype):
    n, k, f, d = shape
    (_, indices), rows, w = code(n, k, f), matrix((n, d), dtype, seed=2), matrix((f, d), dtype)
    out = decode_tpu.gather_dot(rows, indices, w, interpret=True)
    assert (out.shape, out.dtype) == ((n, k), jnp.float32)
    np.testing.assert_allclose(out, products(rows, indices, w), rtol=1e-5, atol=1e-4)


def test_the_neighbour_of_a_packed_row_does_not_leak():
    w = matrix((16, 128), "bfloat16").at[1::2].set(jnp.nan)
    indices = jnp.arange(0, 16, 2, dtype=jnp.int32)[:, None]
    out = decode_tpu.sparse_decode(jnp.ones((8, 1)), indices, w, interpret=True)
    np.testing.assert_array_equal(out, w[::2].astype(jnp.float32))


@pytest.mark.parametrize("when", ["eager", "on_wait"])
def test_no_row_is_read_before_it_arrives_nor_overwritten_before_it_is_used(when, capfd):
    n, k, f, d = 66, 1, 16, 128
    (values, indices), w = code(n, k, f), matrix((f, d), "float32")
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=when)
    out = decode_tpu.sparse_decode(values, indices, w, interpret=params)
    np.testing.assert_allclose(out, decode_ref.sparse_decode(values, indices, w), rtol=1e-5, atol=1e-5)
    assert "RACE" not in "".join(capfd.readouterr()).upper()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"d": 192}, "d = 192"),
        ({"f": 20}, "f = 20"),
        ({"n": 0}, "n = 0"),
        ({"k": 300}, "k = 300"),
        ({"dtype": "float16"}, "float16"),
        ({"kind": "TPU v3"}, "TPU v3"),
    ],
    ids=str,
)
def test_what_the_decode_cannot_serve_is_refused(change, why):
    given = {"n": 8, "k": 4, "f": 16, "d": 128, "dtype": "float32", "kind": "TPU v6 lite"} | change
    n, k, f, d, dtype, kind = given.values()
    shaped = jax.ShapeDtypeStruct
    arrays = shaped((n, k), jnp.float32), shaped((n, k), jnp.int32), shaped((f, d), dtype)
    assert why in decode_tpu.unsuited(Device("tpu", kind), *arrays)
