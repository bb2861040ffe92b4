"""The TPU encode, simulated, equals a sort: for any order, for bins that overflow, and where nothing is finite."""

import itertools
import math
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qscope_kernels.cases import RELEASED
from qscope_kernels.dispatch import Device
from qscope_kernels.topk_encode import ref, tpu, tpu_networks, tpu_plan
from qscope_kernels.topk_encode.tpu_lists import chunk_bits
from qscope_kernels.topk_encode.tpu_plan import Plan

CONTRACTS = "exact", "fast"
SMALL = Plan(bins=128, keep=2, rows=32, parts=2, columns=256)


@cache
def compiled(network, **options):
    # On CPUs, fusing the thousands of steps of the networks takes minutes.
    run = partial(tpu.topk_encode, with_failures=True, interpret=True, **options)
    return jax.jit(run, compiler_options={"xla_disable_hlo_passes": "fusion"} if network else None)


def encode(x, w, b, *, network=False, **options):
    """With the networks of the finish, or with the sort that stands in for them where k or the bins are too many."""
    with pytest.MonkeyPatch.context() as patch:
        if not network:
            patch.setattr(tpu, "_LONGEST_NETWORK", 0)
        return tuple(map(np.asarray, compiled(network, **options)(x, w, b)))


def rounded(pre, bits):
    """What "fast" orders by: the last `bits` bits of float32 dropped; and the middle of what shares the rest."""
    pattern = np.maximum(pre, 0).astype(np.float32).view(np.int32)
    head = pattern & -(1 << bits)
    return head.view(np.float32), np.where(head > 0, head | 1 << bits - 1, 0).astype(np.int32).view(np.float32)


def check(found, pre, k, contract, bins, dense=()):
    """Every row has the k largest values, each at a place that holds it; `dense` rows were encoded anew, unrounded."""
    values, indices, _ = found
    n, f = pre.shape
    assert (values.dtype, indices.dtype, values.shape, indices.shape) == (np.float32, np.int32, (n, k), (n, k))
    assert ((indices >= 0) & (indices < f)).all()
    key, middle = (np.maximum(pre, 0),) * 2 if contract == "exact" else rounded(pre, chunk_bits(f, bins))
    for row in range(n):
        best = np.sort(key[row])[::-1][:k]
        used = best > 0
        at = indices[row][used]
        np.testing.assert_array_equal(key[row][at], best[used])
        assert len(set(at)) == used.sum()
        expected = np.maximum(pre, 0)[row] if row in dense else middle[row]
        np.testing.assert_array_equal(values[row][used], expected[at])
        assert not values[row][~used].any()


def integers(*shape, seed=0, low=-8, high=9):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.float32)


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_any_number_of_tokens_widths_and_latents_with_ties(contract, dtype):
    # Neither 41 rows, nor 24 inputs, nor 700 latents are whole tiles; small integers are exact in both types.
    x, w, b = integers(41, 24), integers(24, 700, seed=1), integers(700, seed=2)
    found = encode(*(jnp.asarray(a, dtype) for a in (x, w, b)), k=5, contract=contract, plan=SMALL._replace(keep=4))
    assert found[2] == 0
    check(found, x @ w + b, 5, contract, 128)


@pytest.mark.parametrize(
    ("contract", "k", "keep"),
    [("exact", 3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fast", 3, 2), ("fast", 9, 3)))],
)
def test_networks_find_the_largest_of_all_lists(contract, k, keep, monkeypatch):
    # A bin keeps fewer than its six columns, and lists of up to 16 bins two or three values, far fewer than is wise.
    # Rows beyond 1024 fill a second block; in some, one bin or one of those lists holds too many.
    monkeypatch.setattr(tpu_plan, "_lengths", lambda *_: (keep,) * 5 + (k,) * 3)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1030, 6)).astype(np.float32), rng.normal(size=(6, 768)).astype(np.float32)
    x[::7, 5] = 9
    w[5, :] = np.where(np.arange(768) % 8 == 3, 1, 0)  # one sublane's bins
    w[5, 3::128] = 2
    plan = SMALL._replace(keep=keep)
    values, indices, failures = encode(x, w, np.zeros(768, np.float32), k=k, contract=contract, plan=plan, network=True)
    pre = np.asarray(jnp.dot(x, w, precision="highest"))
    key = np.maximum(pre, 0) if contract == "exact" else rounded(pre, chunk_bits(768, 128))[0]
    best = -np.sort(-key, axis=1)[:, :k]
    assert 140 <= failures < 700
    assert len({tuple(sorted(row)) for row in indices}) > 500
    assert all(len(set(row)) == k for row in indices)
    np.testing.assert_allclose(values, best, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(key, indices, axis=1), best, rtol=1e-5, atol=1e-5)


def biased(pre, **options):
    """Encodes rows whose pre-activations are `pre` to the last bit: one-hot rows choose among rows of w_enc."""
    n, f = pre.shape
    return encode(np.eye(n, dtype=np.float32), pre, np.zeros(f, np.float32), **options)


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize(
    "k", [*(pytest.param(k, marks=pytest.mark.slow) for k in (1, 130)), 300], ids=["k=1", "k>bins", "k=f>bins"]
)
def test_any_k(contract, k):
    pre = np.random.default_rng(k).normal(size=(9, 300)).astype(np.float32)
    # Three chunks: each bin holds all its columns where it keeps four.
    found = biased(pre, k=k, contract=contract, plan=SMALL._replace(keep=4))
    assert found[2] == 0
    check(found, pre, k, contract, 128)


@pytest.mark.parametrize("contract", CONTRACTS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_pre_activations(contract, data):
    # Two are kept of bins of five: rows fail often, and few or none may be positive.
    number = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e37, -1e37, 2.0**-126]), st.floats(-1e3, 1e3, width=32))
    columns = st.lists(st.tuples(st.integers(0, 599), number), max_size=24)
    pre = np.full((8, 600), data.draw(st.sampled_from([0.0, -1.0])), np.float32)
    for row in pre:
        for column, value in data.draw(columns):
            row[column // 5 % 4 + 128 * (column % 5) if column % 3 else column] = value
    pre[np.abs(pre) < 2.0**-126] = 0  # compilers may flush subnormals
    found = biased(pre, k=6, contract=contract, plan=SMALL, capacity=3)
    failing = [row for row in range(8) if fails(pre[row], 6, contract)]
    assert found[2] == len(failing)
    check(found, pre, 6, contract, 128, failing)


def fails(row, k, contract, bins=128, keep=2):
    """Whether more of the row's k largest share a bin than it keeps, or may: the last kept exceeds the k-th kept."""
    key = np.maximum(row, 0) if contract == "exact" else rounded(row, chunk_bits(len(row), bins))[0]
    kept = np.sort(np.pad(key, (0, -len(row) % bins)).reshape(-1, bins), axis=0)[::-1][:keep]
    return kept[-1].max() > np.sort(kept.ravel())[::-1][k - 1]


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize(
    "capacity", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(64, marks=pytest.mark.slow)]
)
def test_rows_whose_largest_share_a_bin_are_encoded_densely_and_counted(contract, capacity):
    pre = np.random.default_rng(0).uniform(0, 1, (9, 900)).astype(np.float32)
    clustered = [0, 2, 3, 7, 8]
    for row in clustered:
        pre[row, 5::128] += 2
    found = biased(pre, k=5, contract=contract, plan=SMALL._replace(keep=4), capacity=capacity)
    assert found[2] == len(clustered)
    check(found, pre, 5, contract, 128, clustered)
    assert (found[1][clustered] % 128 == 5).all()


@pytest.mark.parametrize("contract", CONTRACTS)
def test_what_is_equal_to_the_kth_fails_nothing(contract):
    pre = np.zeros((3, 900), np.float32)
    pre[0, 7::128] = 1  # seven equal ones in one bin, four kept, three wanted
    pre[1] = 1
    found = biased(pre, k=3, contract=contract, plan=SMALL._replace(keep=4))
    assert found[2] == 0
    check(found, pre, 3, contract, 128)


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize("fault", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
def test_rows_that_are_not_finite_say_so_and_end(contract, fault):
    pre = np.random.default_rng(0).normal(size=(70, 300)).astype(np.float32)
    x, b = np.zeros((70, 4), np.float32), pre[0]
    x[3:69, 0] = fault  # more rows than one pass of the fallback takes
    w = np.zeros((4, 300), np.float32)
    w[0, 17] = 1  # fault * 0 is NaN elsewhere
    values, indices, failures = encode(x, w, b, k=5, contract=contract, plan=SMALL._replace(keep=4))
    assert failures == 66
    expected = ref.topk_encode(jnp.asarray(x), jnp.asarray(w), jnp.asarray(b), k=5)
    np.testing.assert_array_equal(values[3:69], expected[0][3:69])
    assert np.isnan(values[3:69]).all()
    check((values[:3], indices[:3], 0), np.tile(b, (3, 1)), 5, contract, 128)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_an_infinite_pre_activation_ranks_above_the_finite_ones(contract):
    b = np.array([1, np.inf, 3, -np.inf] + [0] * 296, np.float32)
    values, indices, failures = encode(np.zeros((2, 4)), np.zeros((4, 300)), b, k=3, contract=contract, plan=SMALL)
    np.testing.assert_array_equal(values, [[np.inf, 3, 1]] * 2)
    np.testing.assert_array_equal(indices, [[1, 2, 0]] * 2)
    assert failures == 2


def test_outside_jit_a_second_call_compiles_nothing(compilations, monkeypatch):
    monkeypatch.setattr(tpu, "_LONGEST_NETWORK", 0)
    x, w, b = jnp.ones((2, 4)), jnp.ones((4, 130)), jnp.ones(130)
    call = partial(tpu.topk_encode, k=3, contract="exact", plan=SMALL, interpret=True, with_failures=True)
    with compilations() as seen:
        call(x, w, b)
    assert seen
    with compilations() as seen:
        call(x, w, b)
    assert not seen


@pytest.mark.parametrize(
    ("a", "b", "keep"), [(4, 4, 4), (8, 4, 8), (3, 2, 4), (5, 7, 8), (2, 3, 5), (7, 1, 8), (10, 2, 10)]
)
def test_networks_sort_every_pattern_of_zeros_and_ones(a, b, keep):
    patterns = np.array(list(itertools.product([0, 1], repeat=a + b)), np.float32).T
    items = [(jnp.asarray(row), jnp.full(row.shape, i)) for i, row in enumerate(patterns)]
    merged = tpu_networks.merge(tpu_networks.sort(items[:a]), tpu_networks.sort(items[a:]))[:keep]
    keys, places = (np.stack([np.asarray(item[part]) for item in merged]) for part in range(2))
    np.testing.assert_array_equal(keys, -np.sort(-patterns, axis=0)[:keep])
    np.testing.assert_array_equal(np.take_along_axis(patterns, places, axis=0), keys)
    assert all(len(set(column)) == len(column) for column in places.T)


def test_failure_probability_bounds_every_arrangement():
    # All C(12, 3) places of the three larger values among three bins of four columns.
    ways = list(itertools.combinations(range(12), 3))
    for keep in (1, 2, 3):
        true = sum(max(np.bincount(np.array(w) % 3, minlength=3)) >= keep for w in ways) / len(ways)
        bound = tpu_plan.failure_probability(12, 4, 3, keep)
        assert true <= bound * (1 + 1e-9)
        assert bound <= 1
    assert tpu_plan.failure_probability(12, 4, 3, 3) == pytest.approx(3 * math.comb(4, 3) / math.comb(12, 3))
    assert tpu_plan.failure_probability(12, 12, 3, 4) == 0


def test_failure_probability_equals_random_placement():
    rng, (f, k, bins, keep) = np.random.default_rng(0), (4096, 50, 128, 5)
    places = np.argsort(rng.random((4000, f)), axis=1)[:, : k - 1] % bins
    failed = np.mean([np.bincount(row, minlength=bins).max() >= keep for row in places])
    bound = tpu_plan.failure_probability(f, k, bins, keep)
    assert failed == pytest.approx(bound, abs=3 * math.sqrt(bound / 4000))


@pytest.mark.parametrize("case", RELEASED, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", tpu_plan.KINDS)
def test_the_released_shapes_rarely_fail_and_fit(case, kind):
    chip = tpu_plan.chip(kind)
    x = SimpleNamespace(shape=(8192, case.d), dtype=jnp.dtype("bfloat16"))
    w = SimpleNamespace(shape=(case.d, case.f), dtype=jnp.dtype("bfloat16"))
    plan = tpu_plan.make_plan(chip, x, w, case.k)
    assert plan.columns % plan.bins == 0
    assert case.f % plan.columns == 0
    assert 8192 * tpu_plan.failure_probability(case.f, case.k, plan.bins, plan.keep) <= 0.05
    assert tpu.unsuited(Device("tpu", kind), x, w, None, k=case.k, contract="fast") is None


def test_what_it_cannot_serve_is_said():
    array = lambda *shape, dtype="bfloat16": SimpleNamespace(shape=shape, dtype=jnp.dtype(dtype))  # noqa: E731
    why = lambda x, w, k=50, kind="TPU v5 lite": tpu.unsuited(Device("tpu", kind), x, w, None, k=k, contract="fast")  # noqa: E731
    x, w = array(64, 2048), array(2048, 32768)
    assert why(x, w) is None
    assert "not for TPU v99" in why(x, w, kind="TPU v99")
    assert "bfloat16 and float32, not float16" in why(array(64, 2048, dtype="float16"), w)
    assert "x is empty" in why(array(0, 2048), w)
    assert "k = 20000 of 32768 needs more candidates" in why(x, w, k=20000)
    assert "vectors of 262144 do not fit" in why(array(64, 262144), array(262144, 1024))
