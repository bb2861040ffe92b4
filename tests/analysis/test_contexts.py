"""The best places of every feature equal a sort of everything, whatever the order and size of the batches."""

import numpy as np
import pytest

from qscope_jax.analysis.contexts import AFTER, BEFORE, Tokens, add_contexts, init_contexts

F, K, N = 10, 3, 4


def corpus(seed=0, documents=40, levels=7):
    """Documents of 1 to 60 tokens and their codes; few different values, so that many are equal."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, documents)
    ends = np.cumsum(lengths)
    n = int(ends[-1])
    indices = np.argsort(rng.random((n, F - 1)), axis=1)[:, :K]
    values = rng.integers(0, levels, (n, K)).astype(np.float32)
    document = np.repeat(np.arange(documents), lengths)
    begin, end = (ends - lengths)[document], ends[document]
    return values, indices, document, begin, end, rng.integers(0, 1000, n).astype(np.uint32)


def brute_force(values, indices, document, begin, end, ids):
    """{feature: [(value, document, position, window)]}, from the definition."""
    found = {}
    for feature in range(F):
        best = {}
        for token in range(len(values)):
            value = float(values[token][indices[token] == feature].sum())
            if value > best.get(document[token], (0.0, 0))[0]:
                best[document[token]] = (value, token)
        ranked = sorted((-value, d, token) for d, (value, token) in best.items())[:N]
        found[feature] = [
            (
                -value,
                d,
                token - begin[token],
                [
                    int(ids[i]) if begin[token] <= i < end[token] else -1
                    for i in range(token - BEFORE, token + AFTER + 1)
                ],
            )
            for value, d, token in ranked
        ]
    return found


def gather(contexts):
    return {
        feature: [
            (float(value), int(contexts.document[feature, rank]), int(contexts.position[feature, rank]),
             contexts.window[feature, rank].tolist())
            for rank, value in enumerate(contexts.value[feature]) if value > 0
        ]
        for feature in range(F)
    }  # fmt: skip


@pytest.mark.parametrize("size", [7, 64, 10_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_tokens_of_the_best_documents_are_found_in_any_order(seed, size):
    values, indices, document, begin, end, ids = corpus(seed)
    order = np.random.default_rng(seed + 5).permutation(len(values))
    contexts = init_contexts(F, N)
    for rows in np.split(order, range(size, len(order), size)):
        tokens = Tokens(document[rows], rows - begin[rows], ids, rows, begin[rows], end[rows])
        add_contexts(contexts, values[rows], indices[rows], tokens)
    assert gather(contexts) == brute_force(values, indices, document, begin, end, ids)


def test_no_contexts_cost_nothing():
    contexts = init_contexts(F, 0)
    values, indices, document, begin, end, ids = corpus()
    rows = np.arange(len(values))
    add_contexts(contexts, values, indices, Tokens(document, rows - begin, ids, rows, begin, end))
    assert contexts.value.shape == (F, 0)
