"""Batches: few shapes, little padding, every token once, the same for whoever plans them."""

import numpy as np
import pytest

from qscope_jax.data.batches import Buckets, cut_documents, fill_batch, pack_rows, plan_batches, ranges


def documents(lengths):
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.uint32) for n, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize("longest", [1, 8, 9, 100, 4096, 40_960])
def test_bucket_lengths_are_few_and_reach_the_longest_row(longest):
    lengths = Buckets(4096, longest).lengths
    assert list(lengths) == sorted(set(lengths))
    assert lengths[-1] >= longest > (lengths[-2] if len(lengths) > 1 else 0)
    for octave in (8, 16, 32, 64, 128, 1024):
        assert sum(octave <= n < 2 * octave for n in lengths) <= 4
    assert all(n % 8 == 0 for n in lengths if n > 32)


@pytest.mark.parametrize("per_octave", [1, 2, 4])
@pytest.mark.parametrize("shortest", [1, 200])
def test_every_segment_stands_in_one_place_of_a_batch_of_a_known_shape(per_octave, shortest):
    lengths = np.random.default_rng(0).integers(shortest, 300, 5000)
    buckets = Buckets(1024, 300, per_octave)
    plan = plan_batches(lengths, buckets)
    assert sorted(np.concatenate([batch.segments for batch in plan])) == list(range(5000))
    for batch in plan:
        begin, end = batch.begin, batch.begin + lengths[batch.segments]
        assert (begin[1:] >= end[:-1]).all()
        assert (begin // batch.length == (end - 1) // batch.length).all()
        assert end[-1] <= batch.size * batch.length
        assert batch.length in (*buckets.lengths, 64, 128, 256, 512)
        assert batch.size == 1024 // batch.length
    assert len({(batch.size, batch.length) for batch in plan}) <= len(buckets.lengths) + 1


@pytest.mark.parametrize("room", [16, 64, 100])
def test_packed_rows_are_those_of_first_fit_decreasing(room):
    lengths = -np.sort(-np.random.default_rng(3).integers(1, room + 1, 300))
    free, expected = [], []
    for length in lengths:
        row = next((i for i, left in enumerate(free) if left >= length), len(free))
        free[row:] = free[row:] or [room]
        expected.append((row, room - free[row]))
        free[row] -= length
    begin = pack_rows(lengths, room)
    # Segments of one length may change places.
    found = sorted(zip(lengths, begin // room, begin % room, strict=True))
    assert found == sorted((length, *place) for length, place in zip(lengths, expected, strict=True))


def test_short_segments_share_rows_only_where_that_computes_less():
    shared = plan_batches(np.full(400, 20), Buckets(1024, 512, 1))
    assert {batch.length for batch in shared} == {64}
    assert sum(batch.sharing for batch in shared) == 400 - 400 % 3
    alone = plan_batches(np.full(400, 64), Buckets(1024, 512, 1))
    assert {batch.length for batch in alone} == {64}
    assert sum(batch.sharing for batch in alone) == 0
    mixed = plan_batches(np.concatenate([np.full(400, 20), np.full(16, 512)]), Buckets(1024, 512, 1))
    assert {batch.length for batch in mixed} == {64, 512}


@pytest.mark.parametrize("multiple", [2, 8])
def test_on_a_mesh_its_data_axis_divides_the_rows_of_every_batch(multiple):
    lengths = np.random.default_rng(0).integers(1, 300, 999)
    for rows in (3, 11, 999):
        plan = plan_batches(lengths[:rows], Buckets(1000, 300, 2, multiple))
        assert sorted(np.concatenate([batch.segments for batch in plan])) == list(range(rows))
        assert all(batch.size % multiple == 0 for batch in plan)
        assert all(batch.begin[-1] < batch.size * batch.length for batch in plan)
        assert all(batch.size * batch.length <= max(1000, multiple * batch.length) for batch in plan)


def test_the_plan_depends_on_the_lengths_alone():
    lengths = np.random.default_rng(1).integers(1, 60, 700)
    first, again = (plan_batches(lengths.copy(), Buckets(512, 64)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert (a.size, a.length) == (b.size, b.length)
        np.testing.assert_array_equal(a.segments, b.segments)


def test_a_handful_of_texts_is_not_computed_in_a_batch_for_hundreds():
    (batch,) = plan_batches(np.array([12, 9, 10]), Buckets(4096, 512))
    assert batch.size * batch.length <= 64


@pytest.mark.parametrize(("mean", "spread"), [(2.3, 0.5), (3.0, 0.6), (4.0, 0.7)])
@pytest.mark.parametrize("per_octave", [1, 4])
def test_at_most_7_percent_of_the_positions_of_100000_short_documents_are_padding(mean, spread, per_octave):
    lengths = np.random.default_rng(0).lognormal(mean, spread, 100_000).astype(int) + 1
    computed = 0
    for start in range(0, len(lengths), 32_768):
        plan = plan_batches(lengths[start : start + 32_768], Buckets(4096, 4096, per_octave))
        computed += sum(batch.size * batch.length for batch in plan)
    assert 1 - lengths.sum() / computed <= 0.07


@pytest.mark.parametrize("lengths", [[3, 9, 1], [3, 9, 1, 60, 50, 10]])
def test_a_filled_batch_holds_its_segments_each_with_its_own_id_and_zeros(lengths):
    segments = cut_documents(documents(lengths), 64)
    (batch,) = plan_batches(segments.lengths, Buckets(256, 64))
    tokens, mask, ids = fill_batch(batch, segments)
    assert tokens.shape == mask.shape == ids.shape == (batch.size, batch.length)
    assert mask.sum() == sum(lengths)
    assert not tokens[~mask].any()
    for i, segment in enumerate(batch.segments):
        np.testing.assert_array_equal(tokens[mask & (ids == i)], documents(lengths)[segment])
    for row in range(batch.size):
        assert (np.diff(ids[row][mask[row]]) >= 0).all()


def test_truncation_keeps_the_start_of_long_documents():
    segments = cut_documents(documents([5, 12]), 8)
    assert segments.lengths.tolist() == [5, 8]
    assert segments.document.tolist() == [0, 1]


@pytest.mark.parametrize("overlap", [0, 1, 5, 9])
def test_windows_count_every_token_once_and_repeat_only_context(overlap):
    lengths = np.random.default_rng(2).integers(1, 70, 200)
    segments = cut_documents(documents(lengths), 10, long="window", overlap=overlap)
    counted = segments.tokens[ranges(segments.begin + segments.context, segments.end)]
    np.testing.assert_array_equal(counted, np.arange(lengths.sum()))
    assert segments.lengths.max() <= 10
    assert (segments.lengths > segments.context).all()


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="1 to 8"):
        plan_batches(np.array([4, 9]), Buckets(64, 8))
    with pytest.raises(ValueError, match="1 to 8"):
        plan_batches(np.array([0, 3]), Buckets(64, 8))
    with pytest.raises(ValueError, match="overlap = 8"):
        cut_documents(documents([3]), 8, long="window", overlap=8)
    with pytest.raises(ValueError, match="at least 1"):
        Buckets(0, 8)
