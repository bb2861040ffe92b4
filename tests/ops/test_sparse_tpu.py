"""The TPU kernels of the sparse operations, simulated, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qscope_kernels.dispatch import Device
from qscope_kernels.pallas_tpu import not_tpu
from qscope_kernels.sparse_decode import ref as decode_ref
from qscope_kernels.sparse_decode import tpu as decode_tpu
from qscope_kernels.sparse_outer import ref as outer_ref
from qscope_kernels.sparse_outer import tpu as outer_tpu

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


# More and fewer tokens than a step of the grid or a tile has, and numbers that none divides.
SHAPES = [(1, 3, 8, 128), (67, 2, 24, 384), pytest.param((5, 9, 8, 1024), marks=pytest.mark.slow)]


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


def test_a_batch_is_one_call_after_another():
    """Each with a weight of its own, which a kernel reads by itself and Pallas cannot cut for it."""
    w, interpret = matrix((2, 8, 128), "float32"), pltpu.InterpretParams()
    values, indices = map(jnp.stack, zip(code(3, 2, 8), code(3, 2, 8, seed=1), strict=True))
    found = jax.vmap(lambda *arrays: decode_tpu.sparse_decode(*arrays, interpret=interpret))(values, indices, w)
    np.testing.assert_allclose(found, jax.vmap(decode_ref.sparse_decode)(values, indices, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("odd", [0, 1])
def test_the_neighbour_of_a_packed_row_does_not_leak(odd):
    w = matrix((16, 128), "bfloat16").at[1 - odd :: 2].set(jnp.nan)
    indices = jnp.arange(odd, 16, 2, dtype=jnp.int32)[:, None]
    out = decode_tpu.sparse_decode(jnp.ones((8, 1)), indices, w, interpret=True)
    np.testing.assert_array_equal(out, w[odd::2].astype(jnp.float32))


@pytest.mark.parametrize("when", [pytest.param("eager", marks=pytest.mark.slow), "on_wait"])
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


def test_with_64_bits_all_is_refused():
    """Integers of 64 bits would be addresses, which Mosaic does not compile."""
    assert not_tpu(V5E) is None
    with jax.enable_x64(True):
        assert "jax_enable_x64" in str(not_tpu(V5E))


# Small, so that runs and blocks end within groups, at their borders and at those of chunks.
SMALL = {"chunk": 8, "unroll": 2, "interpret": True}


def outer(values, indices, rows, latents, **options):
    assert outer_tpu.unsuited(V5E, values, indices, rows, latents=latents) is None
    sums, totals = outer_tpu.sparse_outer(values, indices, rows, latents=latents, **(SMALL | options))
    assert (sums.shape, totals.shape) == ((latents, rows.shape[1]), (latents,))
    assert sums.dtype == totals.dtype == jnp.float32
    expected = outer_ref.sparse_outer(values, indices, rows, latents=latents)
    np.testing.assert_allclose(sums, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(totals, expected[1], rtol=1e-5, atol=1e-5)
    return sums, totals


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k", "f", "d", "dtype"), [(11, 5, 300, 128, "float32"), (40, 2, 130, 384, "bfloat16")])
def test_outer_adds_up_each_latents_rows(n, k, f, d, dtype):
    values, indices = code(n, k, f)  # most latents are named by no slot
    outer(values, indices, matrix((n, d), dtype), f)


def test_outer_of_latents_that_all_tokens_name():
    n, f = 45, 260
    values, indices = code(n, 3, f)
    # The last of a block, the first of the next, which starts within a group of slots (45 is odd), and the last one.
    few = 140 + jnp.arange(n, dtype=jnp.int32) % 100
    indices = jnp.stack([jnp.full((n,), 127), jnp.full((n,), 128), few.at[3].set(f + 7)], axis=1).astype(jnp.int32)
    sums, totals = outer(values, indices, matrix((n, 256), "float32"), f)
    unnamed = np.setdiff1d(np.arange(f), np.clip(indices, 0, f - 1))
    assert len(unnamed) > 200
    assert not np.any(sums[unnamed])
    assert not np.any(totals[unnamed])


@pytest.mark.slow
def test_outer_in_tiles_of_tokens():
    values, indices = code(10, 3, 140)
    outer(values, indices, matrix((10, 1024), "float32"), 140, tokens=4)


@pytest.mark.all
def test_outer_with_the_groups_that_are_compiled():
    values, indices = code(300, 7, 200)  # 2100 slots: three chunks, long runs
    outer(values, indices, matrix((300, 256), "float32"), 200, chunk=outer_tpu.CHUNK, unroll=outer_tpu.UNROLL)


def test_a_row_that_is_not_finite_stays_with_its_latents():
    indices = jnp.arange(24, dtype=jnp.int32).reshape(12, 2) // 3
    rows = matrix((12, 128), "float32").at[4].set(jnp.nan)  # of latents 2 and 3
    sums, totals = outer_tpu.sparse_outer(jnp.ones((12, 2)), indices, rows, latents=8, **SMALL)
    np.testing.assert_array_equal(np.isnan(sums).all(axis=1), np.isin(np.arange(8), np.unique(indices[4])))
    np.testing.assert_array_equal(totals, np.full(8, 3))


@pytest.mark.parametrize("when", [pytest.param("eager", marks=pytest.mark.slow), "on_wait"])
def test_no_slot_is_read_before_it_arrives(when, capfd):
    values, indices = code(9, 3, 260)
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=when)
    outer(values, indices, matrix((9, 128), "float32"), 260, interpret=params)
    assert "RACE" not in "".join(capfd.readouterr()).upper()


def test_outside_jit_a_second_call_compiles_nothing(compilations):
    (values, indices), rows, w = code(5, 1, 8), matrix((5, 128), "float32"), matrix((8, 128), "float32")

    def call(values, rows):
        decode_tpu.sparse_decode(values, indices, w, interpret=True)
        decode_tpu.gather_dot(rows, indices, w, interpret=True)
        outer_tpu.sparse_outer(values, indices, rows, latents=8, **SMALL)

    others = values * 2, rows * 2
    with compilations() as seen:
        call(values, rows)
    assert seen
    with compilations() as seen:
        call(*others)
    assert not seen


@pytest.mark.parametrize(("d", "mib", "at_least"), [(2048, 128, 8192), (5120, 128, 4096), (5120, 64, 1536)])
def test_tiles_fit_the_vector_memory(d, mib, at_least):
    tokens = outer_tpu.tokens_at_once(d, mib << 20)
    assert tokens >= at_least
    assert outer_tpu.needed_bytes(tokens, d) <= 3 * (mib << 18)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"k": 129}, "129 slots"),
        ({"n": 0}, "0 tokens"),
        ({"d": 96}, "no multiple of 128"),
        ({"d": 65536}, "few fit the vector memory"),
        ({"dtype": "float16"}, "float16"),
        ({"kind": "TPU v4"}, "TPU v4"),
    ],
    ids=str,
)
def test_what_outer_cannot_serve_is_refused(change, why):
    given = {"n": 8, "k": 4, "d": 2048, "dtype": "float32", "kind": "TPU v6 lite"} | change
    n, k, d, dtype, kind = given.values()
    shaped = jax.ShapeDtypeStruct
    arrays = shaped((n, k), jnp.float32), shaped((n, k), jnp.int32), shaped((n, d), dtype)
    assert why in outer_tpu.unsuited(Device("tpu", kind), *arrays, latents=256)
