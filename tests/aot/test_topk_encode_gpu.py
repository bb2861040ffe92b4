"""topk_encode compiled for H200s that are not there: what it keeps at once, and that no row is sorted."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from qscope_kernels.cases import RELEASED
from qscope_kernels.topk_encode import topk_encode
from qscope_kernels.topk_encode.cuda import CHUNK_ELEMENTS
from qscope_kernels.topk_encode.select import group_width
from qscope_kernels.topk_encode.sharded import topk_encode_sharded

pytestmark = [pytest.mark.aot, pytest.mark.slow]
TOKENS = 8192
CASES = [RELEASED[0], *(pytest.param(case, marks=pytest.mark.all) for case in RELEASED[1:])]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def arrays(case, dtype, tokens=()):
    model = ("model",) if tokens else ()
    return ((TOKENS, case.d), dtype, *tokens), ((case.d, case.f), dtype, None, *model), ((case.f,), dtype, *model)


@named
@pytest.mark.parametrize("contract", ["exact", "fast"])
@pytest.mark.parametrize("impl", [None, "gpu"])
def test_pre_activations_are_kept_for_a_chunk_and_no_row_is_sorted(h200s, compiled, case, contract, impl):
    program = compiled(
        h200s(1), partial(topk_encode, k=case.k, contract=contract, impl=impl), *arrays(case, "bfloat16")
    )
    text = program.as_text()
    assert ("mosaic_gpu" in text) == (impl == "gpu")
    if jax.__version_info__ >= (0, 11):
        assert " sort(" not in text
    chunks = -(-TOKENS * case.f // CHUNK_ELEMENTS)
    kept = TOKENS // chunks * case.f * (2 if (impl, contract) == ("gpu", "fast") else 4)
    # Beside them: the maxima of groups and the candidates of the best ones, float32, and what ranks them as much again.
    width = group_width(case.f, case.k)
    beside = 2 * 4 * (TOKENS // chunks) * (case.f // width + case.k * width)
    assert beside < kept
    assert kept <= program.memory_analysis().temp_size_in_bytes < kept + beside


def test_float32_stays_exact_and_needs_no_kernel(h200s, compiled):
    program = compiled(h200s(1), partial(topk_encode, k=50), *arrays(RELEASED[0], "float32"))
    assert "mosaic_gpu" not in program.as_text()


@pytest.mark.parametrize("impl", [None, "gpu"])
def test_over_eight_devices_only_candidates_travel(h200s, compiled, collectives, impl):
    case, mesh = RELEASED[0], h200s(2, 4)
    encode = partial(topk_encode_sharded, k=case.k, mesh=mesh, data="data", model="model", impl=impl)
    program = compiled(mesh, encode, *arrays(case, jnp.bfloat16, tokens=("data",)))
    mine = TOKENS // 2 * case.k
    travels = {(name, size) for name, sizes in collectives(program) for size in sizes}
    assert ("all-gather", 4 * mine) in travels
    assert travels <= {("all-gather", 4 * mine), ("all-gather", mine)}  # what arrives, and what some versions list too
