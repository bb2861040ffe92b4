"""Contrasts equal their definitions on dense arrays, and chance is called chance as often as stated."""

import itertools

import numpy as np
import pytest
from scipy.stats import kstest

from qscope_jax.analysis import contrast as module
from qscope_jax.analysis.contrast import (
    Pooled,
    active_features,
    choose_documents,
    contrast,
    document_auroc,
    false_discovery_rates,
    halves,
    join_pooled,
    labellings,
    pool_tokens,
)
from qscope_jax.analysis.features import auroc, monolinguality

F, K = 30, 6


def tokens(seed=0, documents=24):
    """Codes of tokens of some documents in no order, and the dense form of each document [tokens, F]."""
    rng = np.random.default_rng(seed)
    document = rng.permutation(np.repeat(np.arange(documents), rng.integers(1, 30, documents)))
    indices = np.argsort(rng.random((len(document), F - 1)), axis=1)[:, :K]
    values = rng.gamma(1, 2, (len(document), K)).astype(np.float32) * (rng.random((len(document), K)) < 0.7)
    dense = np.zeros((len(document), F))
    np.put_along_axis(dense, indices, values, axis=1)
    return values, indices, document, [dense[document == d] for d in range(documents)]


def test_pooling_in_pieces_equals_pooling_at_once():
    values, indices, document, dense = tokens()
    whole = pool_tokens(values, indices, document, 24)
    cuts = [slice(0, 50), slice(50, 51), slice(51, None)]
    joined = join_pooled([pool_tokens(values[c], indices[c], document[c], 24) for c in cuts])
    for name in whole._fields:
        np.testing.assert_allclose(getattr(joined, name), getattr(whole, name), rtol=1e-12)
    np.testing.assert_array_equal(whole.tokens, [len(d) for d in dense])
    pairs = [(f, d) for f in range(F) for d in range(24) if dense[d][:, f].any()]
    assert list(zip(whole.feature.tolist(), whole.document.tolist(), strict=True)) == pairs
    for i, (f, d) in enumerate(pairs):
        column = dense[d][:, f]
        np.testing.assert_allclose(whole.total[i], column.sum(), rtol=1e-6)
        assert (whole.largest[i], whole.fired[i]) == (column.max(), (column > 0).sum())
    assert active_features(whole).tolist() == sorted({f for f, _ in pairs})


@pytest.mark.parametrize("numbers", [1 << 22, 100])
def test_the_figures_are_those_of_their_definitions(monkeypatch, numbers):
    monkeypatch.setattr(module, "_NUMBERS", numbers)  # blocks of a few features, too
    values, indices, document, dense = tokens(1)
    groups = np.arange(24) % 3
    found = contrast(pool_tokens(values, indices, document, 24), groups, np.arange(F))
    by_group = [np.concatenate([dense[d] for d in range(24) if groups[d] == g]) for g in range(3)]
    means, rates = np.stack([z.mean(axis=0) for z in by_group]), np.stack([(z > 0).mean(axis=0) for z in by_group])
    np.testing.assert_allclose(found.difference, monolinguality(means)[0], atol=1e-12)
    np.testing.assert_array_equal(found.score, found.difference)
    np.testing.assert_allclose(found.rate, rates[0], rtol=1e-12)
    np.testing.assert_allclose(found.other_rate, rates[1:].max(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(found.other, 1 + rates[1:].argmax(axis=0))
    assert (found.p == 1).all()
    pooled, positive = pool_tokens(values, indices, document, 24), groups == 0
    np.testing.assert_allclose(
        contrast(pooled, groups, np.arange(F), by="rate").score, rates[0] - rates[1:].mean(axis=0), atol=1e-12
    )
    maxima, doc_means = (np.stack([getattr(d, name)(axis=0) for d in dense]) for name in ("max", "mean"))
    for scores, of in ((maxima, "max"), (doc_means, "mean")):
        np.testing.assert_allclose(document_auroc(pooled, positive, np.arange(F), of=of), auroc(scores, positive))
    np.testing.assert_allclose(contrast(pooled, groups, np.arange(F), by="auroc").score, auroc(maxima, positive))


def test_a_half_is_as_if_the_others_were_not_there():
    values, indices, document, _ = tokens(2)
    half = halves(np.arange(24) % 3)
    assert half.tolist() == [0, 0, 0, 1, 1, 1] * 4
    chosen = choose_documents(pool_tokens(values, indices, document, 24), half == 1)
    own = half[document] == 1
    number = np.cumsum(half) - 1
    alone = pool_tokens(values[own], indices[own], number[document[own]], 12)
    for name in alone._fields:
        np.testing.assert_array_equal(getattr(chosen, name), getattr(alone, name))


@pytest.mark.parametrize("by", ["difference", "rate", "auroc"])
def test_p_counts_relabellings_of_whole_documents(by):
    values, indices, document, _ = tokens(3, documents=6)
    pooled, groups = pool_tokens(values, indices, document, 6), np.array([0, 0, 0, 1, 1, 1])
    every = []
    for positive in itertools.combinations(range(6), 3):
        labels = np.ones(6, int)
        labels[list(positive)] = 0
        every.append(contrast(pooled, labels, np.arange(F), by=by).score)
    exact = (np.stack(every) >= every[0] - 1e-9).mean(axis=0)
    found = contrast(pooled, groups, np.arange(F), by=by, permutations=4000)
    np.testing.assert_allclose(found.p, exact, atol=0.03)
    assert found.p.min() >= 1 / 20 - 0.02


@pytest.mark.parametrize(("by", "others"), [("difference", 1), ("difference", 3), ("rate", 1), ("auroc", 2)])
def test_p_is_uniform_where_labels_mean_nothing(by, others):
    rng, found = np.random.default_rng(5), []
    for trial in range(200):  # new documents each time: features of one trial share their labels
        dense = rng.gamma(2, 1, (40, 12, 4)).astype(np.float32)  # 40 documents of 12 tokens, four features
        document = np.repeat(np.arange(40), 12)
        pooled = pool_tokens(dense.reshape(-1, 4), np.tile(np.arange(4), (480, 1)), document, 40)
        pooled = pooled._replace(fired=(pooled.total * 1000).astype(np.int64))  # rates without ties
        groups = rng.permutation(np.arange(40) % (1 + others))
        found.append(contrast(pooled, groups, np.arange(4), by=by, permutations=199, seed=trial).p)
    p = np.concatenate(found)
    assert kstest(p, "uniform").pvalue > 0.01
    assert 0.03 <= (p <= 0.05).mean() <= 0.08


def test_a_planted_feature_is_found_and_nothing_else():
    rng = np.random.default_rng(7)
    document = np.repeat(np.arange(60), 20)
    values = rng.gamma(1, 1, (1200, 50)).astype(np.float32) * (rng.random((1200, 50)) < 0.2)
    groups = np.arange(60) % 2
    values[:, 17] += 2 * (groups[document] == 0) * (rng.random(1200) < 0.5)
    pooled = pool_tokens(values, np.tile(np.arange(50), (1200, 1)), document, 60)
    found = contrast(pooled, groups, np.arange(50), permutations=2000)
    (q,) = false_discovery_rates([found.p])
    assert np.flatnonzero(q < 0.05).tolist() == [17]
    assert found.score.argmax() == 17


def test_q_values_are_those_of_benjamini_and_hochberg_over_all_layers():
    p = [np.array([0.01, 0.5]), np.zeros(0), np.array([0.02, 0.03])]
    q = false_discovery_rates(p)
    np.testing.assert_allclose(np.concatenate(q), [0.04, 0.5, 0.04, 0.04])
    assert [len(part) for part in q] == [2, 0, 2]


def test_one_sided_sets_are_refused():
    values, indices, document, _ = tokens()
    pooled = pool_tokens(values, indices, document, 24)
    with pytest.raises(ValueError, match="documents of both kinds"):
        contrast(pooled, np.zeros(24, int), np.arange(F))
    with pytest.raises(ValueError, match="group 1 has 1 document"):
        halves(np.array([0, 0, 1]))


@pytest.mark.parametrize(("sizes", "by"), [((2, 2), "difference"), ((2, 1, 1), "difference"), ((1, 2, 1), "auroc")])
def test_labellings_that_can_differ_are_counted(sizes, by):
    """By trying all of them: labellings that differ give documents unlike in everything different scores."""
    groups, n = np.repeat(np.arange(len(sizes)), sizes), sum(sizes)
    total = np.array([1.0, 3.1, 7.3, 17.7])
    tokens = np.array([2, 3, 5, 7])
    pooled = Pooled(tokens, np.zeros(n, np.int32), np.arange(n, dtype=np.int32), total, total, np.ones(n, np.int32))
    scores = set()
    for order in itertools.permutations(range(n)):
        labels = groups[list(order)]
        score = contrast(pooled, labels, np.array([0])).score[0] if by == "difference" else tuple(labels == 0)
        scores.add(np.round(score, 9) if by == "difference" else score)
    assert labellings(groups, by) == len(scores)
