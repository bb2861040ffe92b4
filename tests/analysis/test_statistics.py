"""Tallies folded batch by batch equal brute force in NumPy over everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.analysis.statistics import (
    BINS,
    LEVELS,
    QUANTILE_ERROR,
    bin_edges,
    host_tally,
    init_tally,
    merge_tallies,
    summarize_tally,
    update_tally,
)

F, K, SINK = 24, 5, 60.0
update = jax.jit(update_tally, donate_argnums=0)


def codes(n, seed=0):
    """Codes of n tokens, 24 features of which the last never fires, some slots unused; masks; norms with sinks."""
    rng = np.random.default_rng(seed)
    indices = np.argsort(rng.random((n, F - 1)), axis=1)[:, :K].astype(np.int32)
    values = np.clip(-np.sort(-rng.lognormal(0, 2, (n, K)), axis=1), 2.0**-10, 2.0**13).astype(np.float32)
    values[rng.random(n) < 0.2, 3:] = 0
    norms = rng.lognormal(2, 0.5, n).astype(np.float32)
    norms[rng.random(n) < 0.02] *= 100
    return values, indices, rng.random(n) < 0.9, norms


def dense(values, indices, mask, norms):
    """[kept tokens, F]."""
    z = np.zeros((len(values), F))
    np.put_along_axis(z, indices, values, axis=1)
    return z[mask & (norms <= SINK)]


def fold(parts, *, sink=SINK):
    tally = init_tally(F)
    for part in parts:
        tally = update(tally, *part, sink_threshold=sink)
    return host_tally(tally)


def cut(arrays, *places):
    return list(zip(*(np.split(array, places) for array in arrays), strict=True))


def test_counts_maxima_means_and_sinks_are_those_of_the_definition():
    given = codes(3000)
    z, (_, _, mask, norms) = dense(*given), given
    found = summarize_tally(fold(cut(given, 700, 1000, 2500)), sink_threshold=SINK, sae="abc")
    assert found.tokens == len(z)
    assert found.sinks == (mask & (norms > SINK)).sum() > 10
    np.testing.assert_array_equal(found.density, ((z > 0).sum(axis=0) / len(z)).astype(np.float32))
    np.testing.assert_array_equal(found.max, z.max(axis=0).astype(np.float32))
    assert found.max[F - 1] == found.mean[F - 1] == found.quantile(0.5)[F - 1] == 0
    counts = np.maximum((z > 0).sum(axis=0), 1)
    np.testing.assert_allclose(found.mean, z.sum(axis=0) / counts, rtol=1e-6)
    assert (found.sink_threshold, found.sae) == (SINK, "abc")


@pytest.mark.parametrize("q", [0, 0.01, 0.25, 0.5, 0.7, 0.9, 0.99, 1])
def test_quantiles_are_within_the_stated_error_of_sorted_values(q):
    given = codes(2000)
    z = dense(*given)
    found = summarize_tally(fold(cut(given, 999)), sink_threshold=SINK).quantile(q)
    for feature in range(F - 1):
        active = np.sort(z[:, feature][z[:, feature] > 0])
        exact = active[max(int(np.ceil(q * len(active) - 1e-9)), 1) - 1]
        assert abs(found[feature] - exact) <= QUANTILE_ERROR * exact


def test_stored_levels_are_the_histograms_own_and_others_need_it():
    found = summarize_tally(fold([codes(500)]), sink_threshold=SINK)
    for i, q in enumerate(LEVELS):
        np.testing.assert_array_equal(found.quantiles[i], found.quantile(q))
    small = found._replace(histogram=None)
    np.testing.assert_array_equal(small.quantile(0.99), found.quantile(0.99))
    with pytest.raises(ValueError, match=r"quantile\(0.75\).*only the levels"):
        small.quantile(0.75)
    with pytest.raises(ValueError, match="from 0 to 1"):
        found.quantile(99)


def test_bins_follow_the_bits_of_the_values_and_those_beyond_fall_into_the_ends():
    edges = bin_edges()
    assert len(edges) == BINS + 1
    assert (edges[0], edges[-1]) == (2.0**-10, 2.0**14)
    assert (np.diff(edges) / edges[:-1] <= 2 * QUANTILE_ERROR).all()
    below = np.nextafter(edges[1:].astype(np.float32), np.float32(0))
    values = np.concatenate([edges[:-1], below, [1e-7, 1e9]]).astype(np.float32)[:, None]
    tally = update(init_tally(1), values, np.zeros_like(values, np.int32), np.ones(len(values), bool))
    expected = np.full(BINS, 2)
    expected[[0, -1]] += 1
    np.testing.assert_array_equal(tally.histogram[0], expected)


def test_the_median_norm_is_within_its_bin_of_the_exact_one():
    given = codes(4001)
    kept = given[3][given[2] & (given[3] <= SINK)]
    found = summarize_tally(fold([given]), sink_threshold=SINK)
    assert found.median_norm == pytest.approx(np.median(kept), rel=1 / 128)
    values, indices, mask, _ = given
    unknown = host_tally(update(init_tally(F), values, indices, mask))
    assert np.isnan(summarize_tally(unknown, sink_threshold=np.inf).median_norm)


def test_two_halves_merged_are_the_whole():
    given = codes(3000, seed=3)
    one, other = cut(given, 1234)
    merged, whole = merge_tallies(fold([one]), fold([other])), fold([given])
    for name in ("tokens", "sinks", "max", "histogram", "norms"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(merged.sums, whole.sums, rtol=1e-6)


def test_long_sums_do_not_lose_small_values():
    values, indices = np.full((1000, 1), 0.1, np.float32), np.zeros((1000, 1), np.int32)
    tally = update(init_tally(1), np.full((1, 1), 2.0**24, np.float32), indices[:1], np.ones(1, bool))
    for row in range(1000):
        tally = update(tally, values[row : row + 1], indices[:1], np.ones(1, bool))
    assert host_tally(tally).sums[0] == pytest.approx(2.0**24 + 100, abs=1e-3)  # plain float32 would stay at 2^24


def test_what_is_masked_or_unused_may_hold_anything():
    values, indices, mask, norms = codes(300)
    clean = fold([(values, indices, mask, norms)])
    odd = np.where(mask[:, None], values, np.nan), np.where(values > 0, indices, 2**31 - 1), mask
    found = fold([(*odd, np.where(mask, norms, np.nan))])
    for name in clean._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(clean, name), err_msg=name)


def test_nothing_counted_is_refused():
    with pytest.raises(ValueError, match=r"no token counted.*all 3 tokens were sinks"):
        summarize_tally(
            fold([(np.ones((3, 1), np.float32), np.zeros((3, 1), np.int32), np.ones(3, bool), np.full(3, 99.0))]),
            sink_threshold=SINK,
        )


def test_the_update_is_compiled_once_per_shape_and_reuses_its_buffers():
    compiled = jax.jit(update_tally, donate_argnums=0)
    tally = init_tally(F)
    for seed in range(3):
        before = tally.histogram
        tally = compiled(tally, *codes(64, seed), sink_threshold=jnp.float32(SINK + seed))
        assert before.is_deleted()
    assert compiled._cache_size() == 1
