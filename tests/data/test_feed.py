"""The training feed: the same rows whatever the number of processes, every token of every document, exact resume."""

import json

import numpy as np
import pytest

from qscope_jax.data.feed import open_feed
from qscope_jax.data.seeding import split_documents
from qscope_jax.data.synthetic import SyntheticDocuments
from qscope_jax.files.differences import differences

VOCAB = 1000


class Numbered:
    """Document i holds i * 100 + 0, 1, 2, ..., so that every token tells where it stood; `bad` numbers hold none."""

    def __init__(self, lengths, *, name="numbered", bad=()):
        self.name, self.lengths, self.bad = name, list(lengths), set(bad)

    def __len__(self):
        return len(self.lengths)

    def read(self, number):
        if number in self.bad or not self.lengths[number]:
            return "nothing in it"
        return np.arange(self.lengths[number], dtype=np.uint32) + 100 * number

    def place(self, number):
        return f"{self.name}:{number + 1}"

    def fingerprint(self):
        return {"kind": self.name, "lengths": self.lengths, "bad": sorted(self.bad)}


def lengths(count, longest=40, seed=0):
    return np.random.default_rng(seed).integers(1, longest, count).tolist()


def feed(sources, **options):
    settings = {"row_length": 16, "rows": 8, "shards": 4, "seed": 0, "vocab_size": 100_000, "threads": 2}
    return open_feed(sources, **{**settings, **options})


def own(process, processes):
    """The share of the four shards."""
    return range(process * 4 // processes, (process + 1) * 4 // processes)


def take(opened, batches):
    return [next(opened) for _ in range(batches)]


def equal(one, other):
    return all((a == b).all() for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def documents_of(batches, shards):
    """The documents of every shard, in order, put together again from its rows. A cut document is one."""
    found = []
    for shard in range(shards):
        rows = (
            [np.split(b.tokens, shards)[shard] for b in batches],
            [np.split(b.segment_ids, shards)[shard] for b in batches],
        )
        tokens, segments = (np.concatenate(part) for part in rows)
        pieces = [t[s == segment] for t, s in zip(tokens, segments, strict=True) for segment in np.unique(s)]
        documents = []
        for piece in pieces:
            if documents and piece[0] % 100:  # goes on from the row before
                documents[-1] = np.concatenate([documents[-1], piece])
            else:
                documents.append(piece)
        found.append(documents)
    return found


def test_every_position_holds_a_token_and_segments_count_the_documents_of_a_row():
    for batch in take(feed([Numbered(lengths(50))]), 5):
        assert batch.tokens.shape == batch.mask.shape == batch.segment_ids.shape == (8, 16)
        assert batch.tokens.dtype == batch.segment_ids.dtype == np.int32
        assert batch.mask.all()
        assert (batch.segment_ids[:, 0] == 0).all()
        new_document = batch.tokens[:, 1:] // 100 != batch.tokens[:, :-1] // 100
        assert (np.diff(batch.segment_ids) == new_document).all()


def test_rows_put_together_are_the_documents_unchanged_and_each_comes_once_an_epoch():
    sizes = lengths(48)
    found = documents_of(take(feed([Numbered(sizes)]), 20), 4)
    seen = []
    for documents in found:
        for document in documents[:-1]:  # the last is still to be gone on with
            number = document[0] // 100
            np.testing.assert_array_equal(document, np.arange(sizes[number]) + 100 * number)
        seen.append([document[0] // 100 for document in documents])
    epochs = [sorted(number for shard in seen for number in shard[e * 12 : e * 12 + 12]) for e in range(2)]
    assert epochs == [list(range(48))] * 2
    assert [shard[:12] for shard in seen] != [shard[12:24] for shard in seen]  # another order in the second


def test_documents_longer_than_a_row_go_on_in_the_next():
    (documents,) = documents_of(take(feed([Numbered([99, 99])], shards=1, rows=2), 20), 1)
    assert [len(document) for document in documents[:-1]] == [99] * (len(documents) - 1)
    assert len(documents) > 5


def test_nothing_is_added_between_documents_unless_an_end_token_is_asked_for():
    sizes = [3] * 8
    plain = take(feed([Numbered(sizes)], shards=1), 1)[0].tokens.ravel()
    ended = take(feed([Numbered(sizes)], shards=1, end_token=99_999), 1)[0]
    without = ended.tokens.ravel()[ended.tokens.ravel() != 99_999]
    np.testing.assert_array_equal(without, plain[: len(without)])
    assert (ended.tokens.ravel()[3::4] == 99_999).all()
    assert (np.diff(ended.segment_ids)[ended.tokens[:, :-1] == 99_999] == 1).all()  # it ends its document's segment


@pytest.mark.parametrize("processes", [2, 4])
def test_the_global_batches_are_the_same_whatever_the_number_of_processes(processes):
    sources = [Numbered(lengths(40)), Numbered(lengths(30, seed=1), name="other")]
    alone = take(feed(sources, weights=[1, 2]), 6)
    parts = [take(feed(sources, weights=[1, 2], own=own(p, processes)), 6) for p in range(processes)]
    for step, whole in enumerate(alone):
        for i, array in enumerate(whole):
            np.testing.assert_array_equal(array, np.concatenate([part[step][i] for part in parts]))


def test_shards_need_not_be_neighbours_and_come_in_the_order_asked_for():
    source = Numbered(lengths(40), bad=[3])
    whole, part = feed([source]), feed([source], own=np.array([3, 0]))
    expected = [[np.concatenate([np.split(a, 4)[s] for s in (3, 0)]) for a in batch] for batch in take(whole, 6)]
    assert equal(take(part, 6), expected)
    assert json.loads(json.dumps(part.state())) == [whole.state()[3], whole.state()[0]]
    part.restore(feed([source]).state())
    assert equal(take(part, 6), expected)


def test_threads_change_nothing():
    source = SyntheticDocuments(VOCAB, documents=100, mean_length=30)
    assert equal(take(feed([source], threads=1), 5), take(feed([source], threads=4), 5))


@pytest.mark.parametrize("before", [0, 1, 7, 30])  # an epoch ends within the eighth batch, and others later
def test_a_feed_goes_on_from_a_state_as_if_never_stopped(before):
    source = Numbered(lengths(40), bad=[3, 17])
    opened = feed([source], end_token=7)
    take(opened, before)
    state = json.loads(json.dumps(opened.state()))
    counts, rest = opened.counts, take(opened, 12)
    fresh = feed([source], end_token=7)
    take(fresh, 2)  # restoring forgets what was read and prepared before
    fresh.restore(state)
    assert fresh.state() == state
    assert fresh.counts == counts
    assert equal(take(fresh, 12), rest)
    assert fresh.state() == opened.state()


def test_a_state_is_that_of_the_batches_given_out_and_not_of_those_prepared():
    opened = feed([Numbered(lengths(40))])
    begin = opened.state()
    first = take(opened, 1)
    after = opened.state()
    assert [state["row"] for state in begin] == [0] * 4
    assert [state["row"] for state in after] == [2] * 4
    opened.restore(begin)
    assert equal(take(opened, 1), first)
    assert opened.state() == after


def test_another_number_of_processes_goes_on_with_the_same_rows():
    source = Numbered(lengths(40))
    two = [feed([source], own=own(p, 2)) for p in range(2)]
    for opened in two:
        take(opened, 5)
    states = [state for opened in two for state in opened.state()]
    four = [feed([source], own=own(p, 4)) for p in range(4)]
    for opened in four:
        opened.restore(states)
    expected = take(feed([source]), 8)[5:]
    steps = zip(*(take(opened, 3) for opened in four), strict=True)
    assert equal([[np.concatenate(arrays) for arrays in zip(*parts, strict=True)] for parts in steps], expected)


def test_sources_have_their_share_of_the_tokens_however_long_their_documents_are():
    sources = [Numbered([5] * 300), Numbered([90] * 50, name="long")]
    batches = take(feed(sources, weights=[3, 1], rows=64, shards=16), 40)
    share = np.mean([batch.tokens % 100 >= 5 for batch in batches])  # only the long ones go so far
    expected = 0.25 * 85 / 90
    assert abs(share - expected) < 4 * np.sqrt(0.25 * 0.75 / (64 * 40))
    rows = np.concatenate([(batch.tokens % 100 >= 5).any(axis=1) for batch in batches])
    assert len(set(np.add.reduceat(rows, np.arange(0, len(rows), 64)))) > 1  # drawn, not counted out


def test_train_and_held_out_documents_are_disjoint_and_all_and_do_not_depend_on_the_order_seed():
    source, settings = Numbered(lengths(60)), {"held_out": 0.1, "shards": 2}

    def seen(**options):
        opened = feed([source], **settings, **options)
        return opened.documents, {int(n) for batch in take(opened, 30) for n in np.unique(batch.tokens // 100)}

    (train_count,), train = seen(split="train")
    (held_count,), held = seen(split="held-out")
    assert (train_count, held_count) == (54, 6)
    assert not train & held
    assert train | held == set(range(60))
    assert seen(split="held-out", seed=5)[1] == held
    assert seen(split="held-out", split_seed=1)[1] != held


@pytest.mark.parametrize(("documents", "share", "held"), [(1000, 0.01, 10), (5, 0.01, 1), (7, 0, 0), (3, 0.9, 3)])
def test_the_held_out_share_is_exact_and_at_least_one(documents, share, held):
    kept, out = (split_documents(documents, split, share, 3) for split in ("train", "held-out"))
    assert len(out) == held
    assert sorted([*kept, *out]) == list(range(documents))


@pytest.mark.parametrize("shards", [1, 4])
def test_once_every_document_comes_once_and_then_only_pads(shards):
    sizes = lengths(48)
    sizes[7] = 0
    opened = feed([Numbered(sizes, bad=[3, 17])], shards=shards, once=True)
    batches = take(opened, 12)
    expected = {(n, i) for n in set(range(48)) - {3, 7, 17} for i in range(sizes[n])}
    found = np.concatenate([batch.tokens[batch.mask] for batch in batches])
    assert len(found) == len(expected)
    assert {divmod(int(token), 100) for token in found} == expected
    for batch in batches:
        assert not batch.tokens[~batch.mask].any()
        assert not batch.segment_ids[~batch.mask].any()
        assert (batch.mask[:, :-1] >= batch.mask[:, 1:]).all()  # pads are behind the tokens of a row
    assert [bool(batch.mask.any()) for batch in batches] == sorted(
        (batch.mask.any() for batch in batches), reverse=True
    )
    assert not batches[-1].mask.any()
    assert opened.counts == {"documents": 45, "skipped": 3}


def test_once_the_first_rows_are_those_of_an_endless_feed():
    source = Numbered(lengths(48))
    assert equal(take(feed([source], once=True), 5), take(feed([source]), 5))


def test_once_a_source_that_has_ended_leaves_its_rows_to_the_others():
    sources = [Numbered([8] * 16), Numbered([9] * 64, name="other"), Numbered([0] * 4, name="nothing")]
    opened = feed(sources, weights=[20, 1, 20], shards=1, rows=4, once=True)
    batches = take(opened, 13)
    assert [int(batch.mask.sum()) for batch in batches[:11]] == [64] * 11  # 16 * 8 + 64 * 9 = 11 * 64
    assert not batches[11].mask.any()
    found = np.sort(np.concatenate([batch.tokens[batch.mask] for batch in batches]))
    expected = [[np.arange(n) + 100 * i for i in range(count)] for n, count in ((8, 16), (9, 64))]
    np.testing.assert_array_equal(found, np.sort(np.concatenate([np.concatenate(each) for each in expected])))
    assert opened.counts == {"documents": 80, "skipped": 4}


@pytest.mark.parametrize("before", [3, 6, 9])
def test_once_a_feed_goes_on_from_a_state_also_by_other_processes(before):
    source = Numbered(lengths(40), bad=[3, 17])
    opened = feed([source], once=True)
    take(opened, before)
    states = json.loads(json.dumps(opened.state()))
    parts = [feed([source], once=True, own=own(p, 2)) for p in range(2)]
    for part in parts:
        part.restore(states)
    steps = zip(*(take(part, 5) for part in parts), strict=True)
    joined = [[np.concatenate(arrays) for arrays in zip(*each, strict=True)] for each in steps]
    assert equal(joined, take(opened, 5))
    assert opened.counts == {"documents": 38, "skipped": 2}


def test_documents_without_tokens_are_skipped_and_counted():
    opened = feed([Numbered([3, 0, 4, 0, 5, 6], bad=[0])], shards=2, rows=2)
    batches = take(opened, 20)
    assert {int(n) for batch in batches for n in np.unique(batch.tokens // 100)} == {2, 4, 5}
    counts = opened.counts
    assert abs(counts["skipped"] - counts["documents"]) <= 6  # half of all, within an epoch
    assert counts["skipped"] > 20


def test_a_source_without_any_usable_document_is_an_error_that_says_why():
    opened = feed([Numbered([0] * 8)])
    with pytest.raises(ValueError, match=r"numbered: 10,000 documents in a row gave no token.*numbered:\d: nothing"):
        next(opened)


def test_what_fails_is_tried_again_and_no_row_is_lost():
    source = Numbered(lengths(40))
    expected, opened, read = take(feed([source]), 9), feed([source]), source.read
    before = take(opened, 2)

    def broken(number):
        raise OSError("the disk is away")

    source.read = broken
    ahead = []

    def read_on():
        while True:
            ahead.append(next(opened))

    for _ in range(2):
        with pytest.raises(OSError, match="the disk is away"):
            read_on()
    source.read = read
    rows = before + ahead
    assert len(rows) < 9
    assert equal(rows + take(opened, 9 - len(rows)), expected)


def test_fewer_documents_than_shards_are_refused():
    with pytest.raises(
        ValueError, match=r"few: 3 document\(s\) in the split 'train' .* 4 virtual shards .* fewer shards"
    ):
        feed([Numbered([9] * 50), Numbered([9] * 3, name="few")])
    with pytest.raises(ValueError, match=r"numbered: 1 document\(s\) in the split 'held-out' \(of 50, 0.01 held out\)"):
        feed([Numbered([9] * 50)], split="held-out", held_out=0.01)


def test_an_id_beyond_the_vocabulary_is_an_error_with_its_place():
    with pytest.raises(ValueError, match=r"numbered:\d+: token ids from \d+ to \d+; the model has rows for 0..699"):
        take(feed([Numbered([5] * 8)], vocab_size=700), 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": 6}, "shards dividing rows"),
        ({"row_length": 0}, "numbers above 0"),
        ({"own": range(2, 6)}, r"shards among 0\.\.3"),
        ({"own": range(0)}, r"shards among 0\.\.3"),
        ({"own": [1, 3, 1]}, r"own = \[1, 3, 1\]; expected shards among 0\.\.3, each once"),
        ({"weights": [1, 2]}, "a number above 0 for each"),
        ({"weights": [0]}, "a number above 0 for each"),
        ({"weights": [float("nan")]}, "a number above 0 for each"),
        ({"held_out": 1.0}, "share from 0 to below 1"),
        ({"end_token": 100_000}, "ids below 100000"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        feed([Numbered([9] * 8)], **options)


def test_a_state_that_does_not_belong_here_is_refused():
    opened = feed([Numbered(lengths(40))], own=range(2))
    with pytest.raises(ValueError, match=r"no position of shard\(s\) \[0, 1\]; positions are of \[2, 3\]"):
        opened.restore(feed([Numbered(lengths(40))], own=range(2, 4)).state())
    take(opened, 3)
    states = [{**state, "runs": state["runs"] * 2} for state in opened.state()]
    with pytest.raises(ValueError, match=r"a position in 2 source\(s\); this feed has 1"):
        opened.restore(states)
    states = [{**s, "runs": [{**s["runs"][0], "offset": 50}]} for s in opened.state()]
    opened.restore(states)
    with pytest.raises(ValueError, match="the data is not what it was"):
        next(opened)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"seed": 1}, "seed: was 0, is 1"),
        ({"rows": 16}, "rows: was 8, is 16"),
        ({"shards": 2}, "shards: was 4, is 2"),
        ({"row_length": 8}, "row_length: was 16, is 8"),
        ({"end_token": 5}, "end_token: was null, is 5"),
        ({"held_out": 0.1}, "held_out: was 0.0, is 0.1"),
        ({"once": True}, "once: was false, is true"),
    ],
)
def test_the_fingerprint_names_what_differs(options, line):
    source = Numbered([9] * 20)
    assert differences(feed([source]).fingerprint, feed([source], **options).fingerprint) == [line]


def test_the_fingerprint_of_the_same_feed_is_the_same_whoever_reads_it():
    source = Numbered([9] * 20)
    whole, part = feed([source]).fingerprint, feed([source], own=range(1), threads=1).fingerprint
    assert differences(json.loads(json.dumps(whole)), part) == []
    lines = differences(whole, feed([Numbered([9] * 19 + [8])]).fingerprint)
    assert lines == ["sources.0.lengths.19: was 9, is 8"]
    lines = differences(whole, feed([source, source]).fingerprint)
    assert [line.partition(":")[0] for line in lines] == ["sources", "weights"]


def test_synthetic_documents_are_seeded_follow_zipf_and_repeat_themselves():
    source = SyntheticDocuments(VOCAB, documents=500, mean_length=200)
    documents = [source.read(i) for i in range(500)]
    assert all(len(ids) for ids in documents)
    assert abs(np.mean([len(ids) for ids in documents]) - 200) < 4 * 200 / np.sqrt(500)
    counts = np.bincount(np.concatenate(documents), minlength=VOCAB)
    assert len(counts) == VOCAB
    # p(id) = log(1 + 1 / (id + 1)) / log(VOCAB + 1)
    assert counts[0] / counts.sum() == pytest.approx(np.log(2) / np.log(VOCAB + 1), rel=0.1)
    assert counts[9] / counts[0] == pytest.approx(np.log(1.1) / np.log(2), rel=0.2)
    passages = [tuple(ids[i : i + 16]) for ids in documents for i in range(0, len(ids) - 15, 16)]
    assert 0.15 < 1 - len(set(passages)) / len(passages) < 0.25
    np.testing.assert_array_equal(SyntheticDocuments(VOCAB, documents=500, mean_length=200).read(7), documents[7])
    assert len(SyntheticDocuments(VOCAB, seed=1).read(7)) != len(SyntheticDocuments(VOCAB).read(7))
