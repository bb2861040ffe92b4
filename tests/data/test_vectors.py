"""Residual vectors on disk as rows for training: each once an epoch, the same for all processes, resumable."""

import itertools
import json
from typing import Any

import fsspec
import ml_dtypes
import numpy as np
import pytest

from qscope_jax.data.vectors import open_vectors
from qscope_jax.files.errors import SourceNotFoundError
from qscope_jax.files.tensors import write_tensors

D, T = 4, 8


@pytest.fixture
def folder(tmp_path):
    """Two files, of 61 and 40 vectors; vector number i begins with i."""
    vectors = np.arange(101 * D, dtype=np.float32).reshape(101, D) / D
    np.save(tmp_path / "a.npy", vectors[:61])
    write_tensors(tmp_path / "b.safetensors", {"x": vectors[61:]}, {})
    return tmp_path


def opened(folder, **options):
    defaults: dict[str, Any] = dict(d=D, row_length=T, rows=4, shards=2, seed=0)
    return open_vectors([str(folder)], **(defaults | options))


def numbers(rows):
    return rows.x[rows.mask][:, 0].astype(int).tolist()


def test_an_epoch_holds_every_vector_once_and_the_next_has_another_order(folder):
    feed = opened(folder, rows=1, shards=1)  # 8 + 5 rows
    first = [numbers(next(feed)) for _ in range(13)]
    assert sorted(itertools.chain(*first)) == list(range(101))
    assert all(row == list(range(row[0], row[0] + len(row))) for row in first)
    second = [numbers(next(feed)) for _ in range(13)]
    assert first != second
    assert sorted(second) == sorted(first)


def test_batches_are_the_same_whatever_the_number_of_processes(folder):
    whole, parts = opened(folder), [opened(folder, own=range(i, i + 1)) for i in range(2)]
    for _ in range(9):
        want, got = next(whole), [next(part) for part in parts]
        np.testing.assert_array_equal(want.x, np.concatenate([one.x for one in got]))
        np.testing.assert_array_equal(want.mask, np.concatenate([one.mask for one in got]))


def test_shards_come_in_the_order_asked_for(folder):
    whole, part = opened(folder, shards=4), opened(folder, shards=4, own=np.array([3, 1]))
    for _ in range(5):
        np.testing.assert_array_equal(next(part).x, next(whole).x[[3, 1]])
    assert json.loads(json.dumps(part.state())) == [{"shard": 3, "row": 5}, {"shard": 1, "row": 5}]
    for wrong in ([], [1, 1], [4]):
        with pytest.raises(ValueError, match=r"expected shards among 0\.\.3, each once"):
            opened(folder, shards=4, own=wrong)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_once_every_vector_comes_once_and_then_only_what_is_masked(folder, shards):
    feed, endless = (opened(folder, shards=shards, once=once) for once in (True, False))
    np.testing.assert_array_equal(next(feed).x, next(endless).x)
    feed.restore([{"shard": shard, "row": 0} for shard in range(shards)])
    batches = [next(feed) for _ in range(6)]  # 13 rows
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(101))
    assert not any(batch.x[~batch.mask].any() for batch in batches)
    assert not batches[4].mask.any()
    assert feed.counts == {"documents": 13, "skipped": 0}
    assert feed.fingerprint != endless.fingerprint
    other = opened(folder, shards=shards, once=True)
    other.restore([{"shard": shard, "row": 2 * 4 // shards} for shard in range(shards)])
    for batch in batches[2:]:
        np.testing.assert_array_equal(next(other).x, batch.x)


def test_it_goes_on_where_it_was_also_by_another_process(folder):
    feed = opened(folder)
    for _ in range(5):
        next(feed)
    states = json.loads(json.dumps(feed.state()))
    other = opened(folder, own=range(1, 2))
    other.restore(states)
    np.testing.assert_array_equal(next(other).x, next(feed).x[2:])
    with pytest.raises(ValueError, match=r"no position of shard\(s\) \[1\]"):
        other.restore(states[:1])


def test_held_out_rows_are_in_no_batch_of_training(folder):
    train, held = (opened(folder, rows=1, shards=1, held_out=0.3, split=s) for s in ("train", "held-out"))
    seen, unseen = ({n for _ in range(13) for n in numbers(next(feed))} for feed in (train, held))
    assert seen.isdisjoint(unseen)
    assert len(seen | unseen) == 101


def test_the_fingerprint_tells_other_data_and_order(folder, tmp_path):
    before = opened(folder).fingerprint
    assert opened(folder).fingerprint == before == json.loads(json.dumps(before))
    assert opened(folder, seed=1).fingerprint != before
    np.save(folder / "a.npy", np.ones((61, D), np.float32))
    assert opened(folder).fingerprint != before


def test_bfloat16_stays_what_it_is(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"x": np.ones((16, D), ml_dtypes.bfloat16)}, {})
    assert next(opened(tmp_path, rows=2)).x.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("stored", ["<f8", ">f8", ">f4", "<f4"])
def test_wide_and_foreign_numbers_are_given_out_as_float32(tmp_path, stored):
    np.save(tmp_path / "a.npy", np.arange(16 * D).reshape(16, D).astype(stored) / 3)
    np.save(tmp_path / "b.npy", np.ones((8, D), np.float32))
    feed = opened(tmp_path, rows=3, shards=3)
    rows = next(feed)
    assert feed.dtype == rows.x.dtype == np.float32
    assert rows.x.dtype.isnative
    found = rows.x.reshape(-1, D)
    expected = np.concatenate([(np.arange(16 * D) / 3).astype(np.float32).reshape(16, D), np.ones((8, D))])
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_files_of_two_types_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((16, D), np.float16))
    np.save(tmp_path / "b.npy", np.ones((16, D), np.float64))
    with pytest.raises(ValueError, match=r"files of \['float16', 'float64'\]: expected one type"):
        opened(tmp_path)


def test_files_at_an_address_are_fetched(folder, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))
    remote = fsspec.filesystem("memory")
    for path in folder.iterdir():
        remote.pipe(f"memory://vectors/{path.name}", path.read_bytes())
    remote.pipe("memory://vectors/about.txt", b"no vectors")
    remote.pipe("memory://vectors/more/c.npy", b"not looked at")
    remote.pipe("memory://texts/about.txt", b"no vectors")
    here, there = opened(folder), opened("memory://vectors")
    assert there.fingerprint == here.fingerprint
    np.testing.assert_array_equal(next(there).x, next(here).x)
    assert opened("memory://vectors/a.npy").documents == (8,)
    with pytest.raises(SourceNotFoundError, match="memory://absent does not exist"):
        opened("memory://absent")
    with pytest.raises(FileNotFoundError, match=r"memory://texts: no \.npy or \.safetensors"):
        opened("memory://texts")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (np.ones((40, 3), np.float32), {}, r"float32 \(40, 3\); expected floating \[n, 4\]"),
        (np.ones((40, D), np.int32), {}, "int32"),
        (np.ones((0, D), np.float32), {}, r"\(0, 4\)"),
        (np.ones((8, D), np.float32), {}, "1 rows of 8 vectors in the split 'train', but 2 virtual shards"),
        (np.ones((40, D), np.float32), {"rows": 3}, "shards must divide rows"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, content, options, message):
    np.save(tmp_path / "x.npy", content)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **options)


def test_names_that_lead_nowhere_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.npy or \.safetensors"):
        opened(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no \.npy or \.safetensors"):
        opened(tmp_path)
