"""The TPU encode compiles for every kind of TPU, inside shard_map, and no [tokens, latents] exists."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from qscope_kernels.cases import RELEASED, Case
from qscope_kernels.dispatch import device_of
from qscope_kernels.topk_encode import tpu

pytestmark = pytest.mark.aot
KINDS = {"v5e:2x2": "TPU v5 lite", "v5p:2x2x1": "TPU v5", "v6e:2x2": "TPU v6 lite", "tpu7x:2x2x1": "TPU7x"}
SMALL = Case(256, 8192, 50)
TOKENS = 2048  # of a device


def compile_for(tpu_mesh, topology, case, tokens=TOKENS, contract="fast", dtype=jnp.bfloat16):
    """Memory of a device whose share of latents is `case.f`; two devices share the latents, all others the tokens."""
    devices = 8 if topology.startswith("tpu7x") else 4  # two cores a chip
    mesh = tpu_mesh(topology, devices // 2, 2)

    def encode(x, w_enc, b_enc):
        device = device_of(x)
        assert device.kind == KINDS[topology]
        assert tpu.unsuited(device, x, w_enc, b_enc, k=case.k, contract=contract) is None
        return tpu.topk_encode(x, w_enc, b_enc, k=case.k, contract=contract, with_failures=False)

    place = lambda shape, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P(*axes)))  # noqa: E731
    arrays = (
        place((devices // 2 * tokens, case.d), "data", None),
        place((case.d, 2 * case.f), None, "model"),
        place((2 * case.f,), "model"),
    )
    specs = tuple(array.sharding.spec for array in arrays)
    step = jax.shard_map(encode, mesh=mesh, in_specs=specs, out_specs=(jax.P("data", "model"),) * 2)
    lowered = jax.jit(step).lower(*arrays)
    assert lowered.as_text().count("@tpu_custom_call") == 3  # the lists, their finish, the rows that fail
    return lowered.compile().memory_analysis()


@pytest.mark.parametrize("topology", KINDS)
def test_it_compiles_without_pre_activations(tpu_mesh, topology):
    memory = compile_for(tpu_mesh, topology, SMALL)
    assert memory.temp_size_in_bytes < TOKENS * SMALL.f  # half of what bfloat16 pre-activations take


@pytest.mark.parametrize("contract", ["fast", pytest.param("exact", marks=pytest.mark.slow)])
def test_shapes_that_no_tile_divides_compile(tpu_mesh, contract):
    compile_for(tpu_mesh, "v5e:2x2", Case(200, 1000, 7), tokens=3, contract=contract)


@pytest.mark.slow
@pytest.mark.parametrize("topology", KINDS)
def test_float32_and_the_exact_contract_compile(tpu_mesh, topology):
    memory = compile_for(tpu_mesh, topology, SMALL, contract="exact", dtype=jnp.float32)
    assert memory.temp_size_in_bytes < 2 * TOKENS * SMALL.f  # half of float32


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_long_float32_vectors_fit_the_least_vector_memory(tpu_mesh, topology):
    """With the parts that the compiler makes of float32, which two wide parts of a tile would leave no room for."""
    compile_for(tpu_mesh, topology, Case(5120, 8192, 100), tokens=256, contract="exact", dtype=jnp.float32)


@pytest.mark.all
@pytest.mark.parametrize("case", RELEASED, ids=lambda case: case.name)
@pytest.mark.parametrize("contract", ["fast", "exact"])
@pytest.mark.parametrize("topology", KINDS)
def test_the_released_shapes_compile(tpu_mesh, topology, contract, case):
    memory = compile_for(tpu_mesh, topology, case, contract=contract)
    assert memory.temp_size_in_bytes < TOKENS * case.f
