"""The TPU kernels of the sparse operations compile for v5e, v5p, v6e and TPU7x, and move nothing that they need not."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qscope_kernels.cases import RELEASED
from qscope_kernels.dispatch import device_of
from qscope_kernels.sparse_decode import tpu as decode_tpu
from qscope_kernels.sparse_decode.sharded import sparse_decode_sharded
from qscope_kernels.sparse_outer import tpu as outer_tpu

pytestmark = pytest.mark.aot
TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
N = 256
CASES = [pytest.param(case, id=case.name, marks=[pytest.mark.all] if case != RELEASED[0] else []) for case in RELEASED]
targets = pytest.mark.parametrize("target", TARGETS)
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def compiled(tpu_mesh):
    """A function (target, run, unsuited, shapes) -> the program for one device of the target."""

    def make(target, run, unsuited, *shapes):
        devices = tpu_mesh(TARGETS[target], 1, -1).devices
        whole = NamedSharding(Mesh(devices[:, :1], ("data", "model")), PartitionSpec())
        arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]
        why = []

        def checked(*arrays):
            why.append(unsuited(device_of(*arrays), *arrays))
            return run(*arrays)

        lowered = jax.jit(checked).lower(*arrays)
        assert why == [None]
        return lowered.compile()

    return make


def codes(case):
    return ((N, case.k), jnp.float32), ((N, case.k), jnp.int32)


def both(first):
    """Both dtypes of a weight, one of them left to --all."""
    second = {"float32": "bfloat16", "bfloat16": "float32"}[first]
    return pytest.mark.parametrize("dtype", [first, pytest.param(second, marks=pytest.mark.all)])


CODES = 16 * N * 128 * 4  # what codes take in the layouts that a kernel wants; no row, no weight


@targets
@cases
@both("float32")
def test_the_decode_reads_the_weight_where_it_lies(compiled, target, case, dtype):
    program = compiled(target, decode_tpu.sparse_decode, decode_tpu.unsuited, *codes(case), ((case.f, case.d), dtype))
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < CODES
    assert memory.output_size_in_bytes == N * case.d * 4


@targets
@cases
@both("bfloat16")
def test_gather_dot_reads_the_weight_where_it_lies(compiled, target, case, dtype):
    shapes = ((N, case.d), jnp.float32), codes(case)[1], ((case.f, case.d), dtype)
    memory = compiled(target, decode_tpu.gather_dot, decode_tpu.unsuited, *shapes).memory_analysis()
    assert memory.temp_size_in_bytes < CODES


@targets
@cases
@both("float32")
def test_outer_makes_no_row_per_slot(compiled, target, case, dtype):
    outer, unsuited = (
        functools.partial(function, latents=case.f) for function in (outer_tpu.sparse_outer, outer_tpu.unsuited)
    )
    memory = compiled(target, outer, unsuited, *codes(case), ((N, case.d), dtype)).memory_analysis()
    slots = N * case.k
    assert memory.temp_size_in_bytes < CODES + 32 * slots * 4 + 2 * N * case.d * 4 < slots * case.d * 4
    assert memory.output_size_in_bytes >= case.f * (case.d + 1) * 4


def test_gradients_over_a_mesh_use_the_kernels_and_gather_no_weight(tpu_mesh, collectives):
    case, mesh = RELEASED[0], tpu_mesh("v5e:2x2", 2, 2)

    def place(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def loss(values, indices, w_dec):
        return jnp.sum(sparse_decode_sharded(values, indices, w_dec, mesh=mesh, data="data", model="model") ** 2)

    values, indices = (place((N, case.k), dtype, "data", None) for dtype in (jnp.float32, jnp.int32))
    w_dec = place((case.f, case.d), jnp.float32, "model", None)
    program = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(values, indices, w_dec).compile()
    text = program.as_text()
    kernels = {name for name in ("sparse_decode", "gather_dot", "sparse_outer") if f"%{name}." in text}
    assert (len(kernels), text.count("tpu_custom_call")) == (3, 3)
    assert {name for name, _ in collectives(program)} == {"all-reduce"}


def test_gradients_of_both_matrices_share_a_sort(compiled):
    case = RELEASED[0]

    def both_gradients(values, indices, rows):
        outer = functools.partial(outer_tpu.sparse_outer, indices=indices, latents=case.f)
        return outer(values=values, rows=rows), outer(values=values * 2, rows=rows + 1)

    unsuited = functools.partial(outer_tpu.unsuited, latents=case.f)
    text = compiled("v5e", both_gradients, unsuited, *codes(case), ((N, case.d), jnp.float32)).as_text()
    assert text.count("tpu_custom_call") == 2
    assert text.count(" sort(") == 1
