"""What is drawn is what transformers' processors say, row by row, however the rows are batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qscope_jax.generation.sampling import check_sampling, keep_likely, next_token, penalise

VOCAB, DRAWS = 50, 10_000
LOGITS = 2.0 * np.random.default_rng(0).standard_normal((1, VOCAB)).astype(np.float32)
SEEN = np.random.default_rng(1).random((1, VOCAB)) < 0.3
draw = jax.jit(next_token)

CASES = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "top_k": {"temperature": 1.3, "top_k": 7},
    "top_p": {"temperature": 0.9, "top_p": 0.8},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.4},
    "all": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2},
}


def chances(temperature, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """By sorting, in NumPy."""
    scores = LOGITS[0].astype(np.float64)
    scores = np.where(SEEN[0], np.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty), scores)
    scores /= temperature
    order = np.argsort(-scores)
    scores[order[top_k or VOCAB :]] = -np.inf
    mass = np.exp(scores - scores.max())[order]
    mass /= mass.sum()
    found = np.zeros(VOCAB)
    kept = np.cumsum(mass) - mass < top_p
    found[order[kept]] = mass[kept] / mass[kept].sum()
    return found


def draws(first, number, options):
    sampling = check_sampling(number, seeds=np.arange(first, first + number), **options)
    return np.asarray(draw(np.repeat(LOGITS, number, 0), np.repeat(SEEN, number, 0), np.int32(3), sampling))


def fits(counts, expected):
    """The p-value that these counts come from this distribution; what has no mass may not occur."""
    assert not counts[expected == 0].any()
    likely = expected * counts.sum() >= 5
    observed, wanted = counts[likely], expected[likely] * counts.sum()
    if not likely.all():
        observed, wanted = np.append(observed, counts[~likely].sum()), np.append(wanted, counts.sum() - wanted.sum())
    keep = wanted > 1e-6
    return stats.chisquare(observed[keep], wanted[keep], sum_check=False).pvalue


@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_draws_follow_the_distribution(case):
    counts = np.bincount(draws(0, DRAWS, CASES[case]), minlength=VOCAB)
    assert fits(counts, chances(**CASES[case])) > 1e-3
    # and would be told from one a little warmer
    assert fits(counts, chances(**CASES[case] | {"temperature": 1.15 * CASES[case]["temperature"]})) < 1e-3


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_the_distribution_is_that_of_transformers_processors(case):
    torch = pytest.importorskip("torch")
    from transformers import generation

    options = CASES[case]
    processors = generation.LogitsProcessorList(
        [generation.RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))]
        + [generation.TemperatureLogitsWarper(options["temperature"])]
        + ([generation.TopKLogitsWarper(options["top_k"])] if "top_k" in options else [])
        + ([generation.TopPLogitsWarper(options["top_p"])] if "top_p" in options else [])
    )
    ids = torch.from_numpy(np.flatnonzero(SEEN[0]))[None]
    theirs = processors(ids, torch.from_numpy(LOGITS.copy())).softmax(-1)[0].numpy()
    np.testing.assert_allclose(chances(**options), theirs, atol=1e-6)
    counts = np.bincount(draws(0, DRAWS, options), minlength=VOCAB)
    assert fits(counts, theirs.astype(np.float64) / theirs.sum()) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_the_cuts_are_those_of_a_sorted_list(seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((6, 1000)).astype(np.float32) * 3
    top_k = np.array([0, 1, 10, 999, 1000, 5000], np.int32)
    top_p = np.array([0.3, 1.0, 1.0, 0.999, 0.5, 1e-6], np.float32)
    kept = np.isfinite(keep_likely(scores, top_k, top_p))
    for row, k, p, found in zip(scores, top_k, top_p, kept, strict=True):
        order = np.argsort(-row)[: k or None]
        mass = np.exp(row[order].astype(np.float64))
        before = (np.cumsum(mass) - mass) / mass.sum()
        assert set(np.flatnonzero(found)) == set(order[before < p])


def test_ids_that_tie_with_the_last_one_kept_stay():
    scores = jnp.array([[1.0, 2.0, 2.0, 2.0, -0.0, 0.0]])
    kept = np.isfinite(keep_likely(scores, jnp.array([2]), jnp.array([1.0])))
    assert kept[0].tolist() == [False, True, True, True, False, False]


def test_the_penalty_lowers_both_signs_of_seen_ids_alone():
    found = penalise(jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]]), jnp.array([2.0]))
    assert found.tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_a_row_draws_the_same_alone_in_a_batch_and_in_another_order():
    rng = np.random.default_rng(2)
    logits, seen = rng.standard_normal((5, VOCAB)).astype(np.float32), rng.random((5, VOCAB)) < 0.5
    settings = {
        "temperature": np.array([1.0, 0.0, 0.7, 2.0, 1.0]), "top_k": np.array([0, 3, 5, 0, 0]),
        "top_p": np.array([1, 1, 0.9, 0.5, 1]), "repetition_penalty": np.array([1, 1.5, 1, 2, 1]),
        "seeds": np.array([7, 8, 7, 2**32 - 1, 9]),
    }  # fmt: skip
    take = lambda rows: draw(logits[rows], seen[rows], np.int32(0), check_sampling(len(rows), **choose(rows)))  # noqa: E731
    choose = lambda rows: {name: value[rows] for name, value in settings.items()}  # noqa: E731
    together = np.asarray(take(np.arange(5)))
    order = np.array([3, 0, 4, 2, 1])
    np.testing.assert_array_equal(take(order), together[order])
    for row in range(5):
        assert take(np.array([row])) == together[row]
    again = [np.asarray(draw(logits, seen, np.int32(i), check_sampling(5, **settings))) for i in range(1, 6)]
    assert any((other != together)[[0, 3, 4]].any() for other in again)  # each token has noise of its own
    assert all(other[1] == together[1] for other in again)  # greedy rows have none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, r"temperature = -1; expected at least 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        (
            {"temperature": [1.0, 1.0, 1.0], "seeds": [1, 2]},
            r"temperature has shape \(3,\); expected one number, or one",
        ),
        ({"temperature": "warm"}, "temperature = 'warm'; expected a number"),
        ({"top_p": 0.0}, "top_p = 0.0; expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 2.5}, "top_k = 2.5; expected a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0; expected above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf"),
        ({"temperature": 1.0}, "give seeds, one integer for each of the 2 row"),
        ({"seeds": [1]}, r"expected one integer per row, \(2,\)"),
        ({"seeds": 1}, r"expected one integer per row, \(2,\)"),
        ({"seeds": [0.5, 1.0]}, "seeds are float64"),
        ({"seeds": [0, -1]}, r"expected integers in 0..2\*\*32 - 1"),
        ({"seeds": [0, 1 << 32]}, r"expected integers in 0..2\*\*32 - 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(2, **options)
