"""Pooled features equal what a loop over a dense array would find."""

import numpy as np
import pytest

from qscope_jax.data.pooling import Rows, join_rows, merge_rows, pool_codes, rank_rows, take_rows

D_SAE = 40


def codes(rows=7, tokens=6, k=5, d_sae=D_SAE, seed=0):
    """Random codes [b, t, k] with unused slots and repeated values, and which tokens count."""
    rng = np.random.default_rng(seed)
    indices = np.argsort(rng.random((rows, tokens, d_sae)), axis=-1)[..., :k]
    values = np.maximum(rng.integers(-2, 9, (rows, tokens, k)), 0).astype(np.float32) / 4
    counted = rng.random((rows, tokens)) < 0.7
    counted[2] = False
    return values, indices, counted


def pooled(values, indices, counted, d_sae, pool):
    """The pooled codes of the tokens that count, each row on its own."""
    return pool_codes(values[counted], indices[counted], np.nonzero(counted)[0], len(counted), d_sae, pool)


def dense(values, indices, counted, d_sae=D_SAE):
    """[b, t, f] with zeros where a token does not count."""
    out = np.zeros((*values.shape[:2], d_sae), np.float32)
    np.put_along_axis(out, indices, values, axis=-1)
    return out * counted[..., None]


def as_dense(rows, d_sae=D_SAE):
    out = np.zeros((len(rows.offsets) - 1, d_sae))
    row = np.repeat(np.arange(len(out)), np.diff(rows.offsets))
    assert len(set(zip(row, rows.features, strict=True))) == len(row)
    out[row, rows.features] = rows.values
    return out


EXPECTED = {
    "max": lambda z: z.max(axis=1),
    "last": lambda z: z.max(axis=1),
    "count": lambda z: (z > 0).sum(axis=1),
    "mean": lambda z: z.sum(axis=1, dtype=np.float64),
}


@pytest.mark.parametrize("pool", EXPECTED)
@pytest.mark.parametrize("d_sae", [D_SAE, 1 << 20])
def test_pooling_equals_the_loop(pool, d_sae):
    values, indices, counted = codes()
    rows = pooled(values, indices, counted, d_sae, pool)
    np.testing.assert_allclose(as_dense(rows), EXPECTED[pool](dense(values, indices, counted)), rtol=1e-12)


def test_wide_dictionaries_and_many_rows_take_the_slower_way_to_the_same_result():
    values, indices, counted = codes(rows=40)
    fast = pooled(values, indices, counted, D_SAE, "max")
    slow = pooled(values, indices, counted, 1 << 31, "max")
    np.testing.assert_array_equal(fast.features, slow.features)
    np.testing.assert_array_equal(fast.values, slow.values)


def test_nothing_that_counts_gives_empty_rows():
    values, indices, counted = codes()
    for pool in EXPECTED:
        rows = rank_rows(pooled(values, indices, np.zeros_like(counted), D_SAE, pool))
        assert rows.offsets.tolist() == [0] * 8


def test_rows_are_ranked_by_falling_value_and_ties_by_feature():
    features = np.array([9, 3, 5, 7, 2, 1], np.uint32)
    rows = rank_rows(Rows(np.array([0, 4, 4, 6]), features, np.array([1, 2, 2, 0.5, 3, 3], np.float32)))
    assert rows.offsets.tolist() == [0, 4, 4, 6]
    assert rows.features.tolist() == [3, 5, 9, 7, 1, 2]
    assert rows.values.tolist() == [2, 2, 1, 0.5, 3, 3]


def test_top_minimum_and_allowed_features():
    values, indices, counted = codes()
    whole = as_dense(rank_rows(pooled(values, indices, counted, D_SAE, "max")))
    allowed = np.arange(D_SAE) % 2 == 0
    rows = rank_rows(pooled(values, indices, counted, D_SAE, "max"), top=3, min_value=0.75, allowed=allowed)
    for row in range(len(whole)):
        chosen = [(-v, f) for f, v in enumerate(whole[row]) if v >= 0.75 and f % 2 == 0]
        expected = [f for _, f in sorted(chosen)[:3]]
        assert rows.features[rows.offsets[row] : rows.offsets[row + 1]].tolist() == expected


@pytest.mark.parametrize("pool", ["max", "count", "mean"])
def test_windows_merge_into_their_documents(pool):
    values, indices, counted = codes()
    rows = pooled(values, indices, counted, D_SAE, pool)
    owner = np.array([0, 0, 1, 2, 2, 2, 3])
    whole = dense(values, indices, counted)
    expected = [EXPECTED[pool](whole[owner == d].reshape(1, -1, D_SAE))[0] for d in range(4)]
    np.testing.assert_allclose(as_dense(merge_rows(rows, owner, 4, pool)), expected, rtol=1e-12)


def test_rows_can_be_reordered_and_joined():
    values, indices, counted = codes()
    rows = pooled(values, indices, counted, D_SAE, "max")
    order = np.random.default_rng(3).permutation(7)
    np.testing.assert_array_equal(as_dense(take_rows(rows, order)), as_dense(rows)[order])
    parts = [take_rows(rows, np.arange(3)), take_rows(rows, np.arange(3, 7))]
    np.testing.assert_array_equal(as_dense(join_rows(parts)), as_dense(rows))
    assert join_rows([]).offsets.tolist() == [0]
