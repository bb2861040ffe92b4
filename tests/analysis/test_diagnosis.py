"""Loops and offending tokens in planted examples."""

import numpy as np
import pytest

from qscope_jax.analysis.diagnosis import Loop, character_spans, covering, loop_ends, rise, tail_loop


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("xyz abcabcabc", (4, 3, 3)),
        ("xyz abcabcabcab", (4, 3, 3)),  # cut off within the phrase
        ("caabcabcabc", (2, 3, 3)),
        ("aaaa", (0, 1, 4)),
        ("abababab", (0, 2, 4)),  # and not abab twice
        ("q bookbookbook", (2, 4, 3)),
        ("a bcbc", None),  # twice is no loop
        ("abcabcabcx", None),  # it went on
        ("abc", None),
        ("", None),
        # the longest loop, not the shortest phrase: it ends in "..." too, and that thrice
        ("go on... go on... go on...", (0, 9, 2)),
    ],
)
def test_the_loop_at_the_end_is_found(text, loop):
    least = 2 if loop and loop[2] == 2 else 3
    found = tail_loop(np.frombuffer(text.encode(), np.uint8), least=least)
    assert found == (None if loop is None else Loop(*loop))


def test_equal_to_trying_every_period_on_random_texts():
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = np.concatenate(
            [rng.integers(0, 3, rng.integers(0, 9)), np.tile(rng.integers(0, 3, 4), 4)[: rng.integers(9, 17)]]
        )
        best = None
        for period in range(1, len(ids) // 3 + 1):
            start = len(ids) - period
            while start > 0 and ids[start - 1] == ids[start - 1 + period]:
                start -= 1
            if len(ids) - start >= 3 * period and (best is None or start < best[0]):
                best = (start, period, (len(ids) - start) // period)
        assert tail_loop(ids) == (None if best is None else Loop(*best))  # fmt: skip


def test_each_token_of_a_phrase_is_compared_with_itself():
    ids = np.frombuffer(b"xyz abcabcabcab", np.uint8)
    loop = tail_loop(ids)
    assert loop
    last, first = loop_ends(loop, len(ids))
    assert first.tolist() == [4, 5, 6]
    assert last.tolist() == [13, 14, 12]
    np.testing.assert_array_equal(ids[last], ids[first])


def test_a_planted_feature_rises_most():
    rng = np.random.default_rng(1)
    indices = np.argsort(rng.random((60, 39)), axis=1)[:, :5]
    values = rng.gamma(1, 1, (60, 5)).astype(np.float32)
    wrong = np.zeros(60, bool)
    wrong[[7, 8, 30, 31, 32]] = True
    indices[wrong, 0], values[wrong, 0] = 39, 5.0
    values[3, 4] = 0
    found = rise(values, indices, wrong, ~wrong, 40)
    assert found.difference.argmax() == 39
    assert (found.mean[39], found.rate[39], found.other_mean[39], found.other_rate[39]) == (5, 1, 0, 0)
    dense = np.zeros((60, 40))
    np.put_along_axis(dense, indices, values, axis=1)
    np.testing.assert_allclose(found.difference, dense[wrong].mean(axis=0) - dense[~wrong].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.other_rate, (dense[~wrong] > 0).mean(axis=0))
    with pytest.raises(ValueError, match="no token to compare with"):
        rise(values, indices, np.ones(60, bool), np.zeros(60, bool), 40)


def test_a_character_marks_every_token_that_holds_a_byte_of_it():
    text = "a中b"
    raw = text.encode()
    pieces = [raw[:2], raw[2:3], raw[3:5]]  # "a" and a byte of 中; a byte; the last one and "b"
    assert character_spans(text, [(1, 2)]) == [(1, 4)]
    assert covering(pieces, [(1, 4)]).tolist() == [True, True, True]
    assert covering([b"a", raw[1:4], b"b"], [(1, 4)]).tolist() == [False, True, False]
    assert covering([b"a", b"", b"b"], [(0, 1)]).tolist() == [True, False, False]


def test_bytes_that_are_no_text_do_not_shift_what_follows():
    raw = b"\xff\xffz"
    text = raw.decode("utf-8", "surrogateescape")
    at = text.index("z")
    assert character_spans(text, [(at, at + 1)]) == [(2, 3)]
