"""The comparison of two texts by the definition of the release's demo."""

import numpy as np
import pytest

from qscope_jax.analysis.compare import activations, compare_rates, kept_tokens, strongest

ONE, TWO = np.array([5, 6, 7, 8, 9, 7]), np.array([5, 6, 1, 8])


def test_what_counts_follows_the_options():
    keep = lambda **options: [mask.astype(int).tolist() for mask in kept_tokens([ONE, TWO], **options)]  # noqa: E731
    assert keep() == [[1] * 6, [1] * 4]
    assert keep(skip_first=True) == [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1]]
    assert keep(drop_prefix=True) == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1]]
    assert keep(drop_common=True) == [[0, 0, 1, 0, 1, 1], [0, 0, 1, 0]]
    assert kept_tokens([ONE], skip_first=True)[0].tolist() == [False, *[True] * 5]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([ONE, ONE], {"drop_prefix": True}, "no token of text 1"),
        ([ONE, ONE[:3]], {"drop_prefix": True}, "no token of text 2"),
        ([ONE, np.array([9])], {"skip_first": True}, r"no token of text 2 \(1 tokens\)"),
        ([ONE], {"drop_common": True}, "takes two texts"),
    ],
)
def test_nothing_left_is_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        kept_tokens(texts, **options)


def code(n, seed):
    rng = np.random.default_rng(seed)
    indices = np.argsort(rng.random((n, 12)), axis=1)[:, :4]
    values = rng.gamma(1, 1, (n, 4)) * (rng.random((n, 4)) < 0.7)
    dense = np.zeros((n, 12))
    np.put_along_axis(dense, indices, values, axis=1)
    return (values.astype(np.float32), indices), dense.astype(np.float32)


def test_rates_are_shares_of_kept_tokens_and_rank_by_their_difference():
    (one, dense_one), (two, dense_two) = code(20, 0), code(9, 1)
    kept = [np.arange(20) > 2, np.arange(9) != 4]
    rates = [(dense[mask] > 0).mean(axis=0) for dense, mask in zip((dense_one, dense_two), kept, strict=True)]
    found = compare_rates([one, two], kept, 5)
    order = np.argsort(-abs(rates[0] - rates[1]), kind="stable")[:5]
    assert [row.feature for row in found] == order.tolist()
    for row in found:
        assert (row.first, row.second) == (rates[0][row.feature], rates[1][row.feature])
        assert row.difference == row.first - row.second


def test_equal_texts_differ_in_nothing():
    (one, _), kept = code(6, 2), np.ones(6, bool)
    assert compare_rates([one, one], [kept, kept], 5) == []


def test_the_strongest_features_of_a_text_are_by_mean():
    (one, dense), kept = code(20, 3), np.arange(20) % 3 > 0
    found = strongest(*one, kept, 4)
    means = dense[kept].mean(axis=0)
    assert [row.feature for row in found] == np.argsort(-means)[:4].tolist()
    for row in found:
        column = dense[kept][:, row.feature]
        assert row[1:] == pytest.approx((column.mean(), column.max(), (column > 0).mean()), rel=1e-6)
    np.testing.assert_array_equal(activations(*one, found[0].feature), dense[:, found[0].feature])
