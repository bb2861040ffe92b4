"""A checksum changes with any element and any order, and not with the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.mesh import make_mesh
from qscope_jax.training.checksums import checksums

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"]


def checksum(array):
    return checksums([jnp.asarray(array)])[0]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 2**32 - 1), st.data())
def test_one_flipped_bit_is_always_noticed(dtype, seed, data):
    array = np.random.default_rng(seed).integers(0, 2, (6, 5)).astype(jnp.dtype(dtype))
    changed = array.copy()
    width = 1 if dtype == "bool" else 8
    at = data.draw(st.integers(0, array.nbytes - 1))
    changed.view(np.uint8).reshape(-1)[at] ^= 1 << data.draw(st.integers(0, width - 1))
    assert checksum(changed) != checksum(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_places_count(dtype):
    x = np.zeros((4, 3)).astype(jnp.dtype(dtype))
    x[1, 2] = 1
    others = [x.T, x.reshape(-1), np.roll(x, 1, 0), np.roll(x, 1, 1), np.zeros_like(x), np.zeros((4, 4), x.dtype)]
    sums = [checksum(other) for other in [x, *others]]
    assert len(set(sums)) == len(sums)


def test_many_changes_are_noticed():
    """Pairs of flipped signs, which cancel in a plain weighted sum."""
    x = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    sums = {checksum(x)}
    for row in range(39):
        changed = x.copy()
        changed[row : row + 2, 7] *= -1
        sums.add(checksum(changed))
    assert len(sums) == 40


def test_how_an_array_lies_does_not_count():
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    expected = checksum(x)
    for shape in ((2, 4), (8, 1)):
        mesh = make_mesh(*shape)
        for spec in ((), ("data",), (None, "model"), ("model", "data"), (("data", "model"),)):
            placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            assert checksums([placed, jnp.ones(2), placed]) == [expected, checksum(jnp.ones(2)), expected]


def test_keys_and_scalars_have_checksums():
    keys = jax.random.split(jax.random.key(0), 3)
    assert checksum(keys) == checksum(jax.random.key_data(keys)) != checksum(keys[::-1])
    assert checksum(jnp.float32(1)) != checksum(jnp.float32(2))
    assert checksum(jnp.zeros((0, 3))) == 0
