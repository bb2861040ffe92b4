"""Which features tell groups apart: closed forms and brute force."""

import numpy as np
import pytest

from qscope_jax.analysis.features import auroc, firing_rates, monolinguality, pool_max


def test_auroc_is_the_chance_that_a_positive_scores_higher_and_ties_count_half():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 4, (30, 5)).astype(float), rng.random(30) < 0.4
    pairs = scores[positive][:, None] - scores[~positive][None]
    brute = ((pairs > 0) + 0.5 * (pairs == 0)).mean(axis=(0, 1))
    np.testing.assert_allclose(auroc(scores, positive), brute, rtol=1e-12)


def test_auroc_needs_both_kinds():
    with pytest.raises(ValueError, match="0 positive and 3 negative"):
        auroc(np.zeros((3, 1)), np.zeros(3, bool))


def test_monolinguality_compares_a_group_with_the_unweighted_mean_of_the_others():
    means = np.array([[3.0, 0.0], [1.0, 0.0], [2.0, 6.0]])
    np.testing.assert_allclose(monolinguality(means), [[1.5, -3.0], [-1.5, -3.0], [0.0, 6.0]])
    with pytest.raises(ValueError, match="found 1"):
        monolinguality(means[:1])


def test_firing_rates_and_pooling_ignore_unused_slots():
    values = np.array([[2.0, 1.0], [3.0, 0.0], [4.0, 0.0]], np.float32)
    indices = np.array([[0, 1], [1, 0], [2, 2]])
    rates = firing_rates(values, indices, np.array([0, 0, 1]), 4)
    np.testing.assert_allclose(rates, [[0.5, 1.0, 0, 0], [0, 0, 1.0, 0]])
    pooled = pool_max(values, indices, np.array([0, 0, 1]), 4)
    np.testing.assert_allclose(pooled, [[2, 3, 0, 0], [0, 0, 4, 0]])
