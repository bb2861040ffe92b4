"""The Hopper kernels of the sparse operations, compiled for H200s that are not there: down to PTX, nothing is run."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from qscope_kernels.cases import RELEASED
from qscope_kernels.sparse_decode import gpu as decode_gpu
from qscope_kernels.sparse_outer import gpu as outer_gpu

pytestmark = pytest.mark.aot
TOKENS = 8192


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", RELEASED, ids=lambda case: case.name)
def test_decode_and_its_products_need_no_temporaries(h200s, compiled, case, dtype):
    d, f, k = case
    slots, w = ((TOKENS, k), jnp.int32), ((f, d), dtype)
    decode = compiled(h200s(1), decode_gpu.sparse_decode, ((TOKENS, k), jnp.float32), slots, w)
    products = compiled(h200s(1), decode_gpu.gather_dot, ((TOKENS, d), jnp.float32), slots, w)
    for program in (decode, products):
        assert "mosaic_gpu" in program.as_text()
        assert program.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", [RELEASED[0], RELEASED[-1]], ids=lambda case: case.name)
def test_outer_needs_the_sums_of_pieces_and_no_atomics(h200s, compiled, case, dtype):
    d, f, k = case
    outer = lambda *arrays: outer_gpu.sparse_outer(*arrays, latents=f)  # noqa: E731
    slots = ((TOKENS, k), jnp.float32), ((TOKENS, k), jnp.int32)
    program = compiled(h200s(1), outer, *slots, ((TOKENS, d), dtype))
    assert program.as_text().count("mosaic_gpu") >= 2
    assert " scatter(" not in program.as_text()
    pieces = TOKENS * k // outer_gpu.PIECE * d * 4
    assert program.memory_analysis().temp_size_in_bytes < pieces + 32 * TOKENS * k


def test_each_device_of_several_decodes_its_own_tokens(h200s, compiled):
    d, f, k = RELEASED[0]
    mesh = h200s(4)
    tokens, whole = PartitionSpec("data"), PartitionSpec()
    decode = jax.shard_map(decode_gpu.sparse_decode, mesh=mesh, in_specs=(tokens, tokens, whole), out_specs=tokens)
    slots = ((TOKENS, k), jnp.float32, "data"), ((TOKENS, k), jnp.int32, "data")
    program = compiled(mesh, decode, *slots, ((f, d), jnp.bfloat16))
    assert "all-gather" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes == 0


def test_the_gradient_of_several_devices_is_a_sum_of_theirs(h200s, compiled):
    d, f, k = RELEASED[0]
    mesh = h200s(2)
    tokens, whole = PartitionSpec("data"), PartitionSpec()

    def outer(values, indices, rows):
        return jax.lax.psum(outer_gpu.sparse_outer(values, indices, rows, latents=f), "data")

    summed = jax.shard_map(outer, mesh=mesh, in_specs=(tokens,) * 3, out_specs=whole)
    slots = ((TOKENS, k), jnp.float32, "data"), ((TOKENS, k), jnp.int32, "data")
    program = compiled(mesh, summed, *slots, ((TOKENS, d), jnp.bfloat16, "data"))
    assert "all-reduce" in program.as_text()
    assert "all-gather" not in program.as_text()
