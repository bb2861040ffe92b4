"""The difference of means points from what is not to what is."""

import ml_dtypes
import numpy as np
import pytest

from qscope_jax.analysis.directions import difference_of_means


def test_it_equals_the_difference_of_the_two_means():
    rng = np.random.default_rng(0)
    vectors, positive = rng.normal(size=(3, 5000, 4)), rng.random((3, 5000)) < 0.3
    expected = vectors[positive].mean(axis=0) - vectors[~positive].mean(axis=0)
    found = difference_of_means(vectors, positive)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_it_finds_a_planted_direction():
    rng = np.random.default_rng(1)
    planted = rng.normal(size=16)
    positive = np.arange(4000) % 2 == 0
    vectors = rng.normal(size=(4000, 16)) + positive[:, None] * planted
    found = difference_of_means(vectors, positive)
    assert found @ planted / np.linalg.norm(found) / np.linalg.norm(planted) > 0.99
    np.testing.assert_allclose(difference_of_means(vectors, ~positive), -found)


def test_what_the_mask_leaves_out_does_not_count():
    rng = np.random.default_rng(2)
    vectors, positive = rng.normal(size=(60, 4)), np.arange(60) < 30
    mask = np.arange(60) % 3 > 0
    expected = difference_of_means(vectors[mask], positive[mask])
    vectors[~mask] = np.nan
    np.testing.assert_array_equal(difference_of_means(vectors, positive, mask), expected)


def test_bfloat16_is_summed_in_float64():
    vectors = np.concatenate([np.full((300, 2), 257), np.full((300, 2), 1)]).astype(ml_dtypes.bfloat16)
    exact = np.unique(vectors.astype(np.float64))
    found = difference_of_means(vectors, np.arange(600) < 300)
    np.testing.assert_array_equal(found, exact.max() - exact.min())


@pytest.mark.parametrize(
    ("vectors", "positive", "mask", "says"),
    [
        (np.ones((4, 2)), np.ones(4, bool), None, "found 4 positive and 0 others"),
        (np.ones((4, 2)), np.arange(4) < 2, np.arange(4) > 1, "found 0 positive and 2 others"),
        (np.ones((4, 2)), np.arange(4) < 2, None, "the means are equal"),
        (np.full((4, 2), np.nan), np.arange(4) < 2, None, "not finite"),
        (np.ones((4, 2)), np.ones(3, bool), None, "do not fit"),
        (np.ones((4, 2)), np.ones(4, bool), np.ones(5, bool), "do not fit"),
        (np.ones(4), np.ones((), bool), None, "do not fit"),
    ],
)
def test_what_has_no_direction_is_refused(vectors, positive, mask, says):
    with pytest.raises(ValueError, match=says):
        difference_of_means(vectors, positive, mask)
