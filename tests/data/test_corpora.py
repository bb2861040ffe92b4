"""Corpora as token ids: nothing added or lost, any row in any order, bad rows with their reasons."""

import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qscope_jax.data.corpora import open_sources, open_texts, open_tokens
from qscope_jax.data.feed import open_feed
from qscope_jax.data.tokenizer import load_tokenizer
from qscope_jax.files.differences import differences

TEXTS = ["the quick brown fox", "ein Hund schläft", "", "über <|endoftext|> hinaus", "  ", "über", "dog " * 50]
VOCAB = 303


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


def write_jsonl(path, column, values):
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return str(path)


def write_parquet(path, column, values, kind=None, **options):
    pq.write_table(pa.table({column: pa.array(values, kind)}), path, **options)
    return str(path)


def everything(source, order=None):
    return [
        found if isinstance(found, str) else found.tolist()
        for found in (source.read(number) for number in order or range(len(source)))
    ]


def test_texts_become_their_tokens_with_nothing_added(tmp_path, tokenizer):
    source = open_texts([write_jsonl(tmp_path / "a.jsonl", "text", TEXTS)], tokenizer, vocab_size=VOCAB)
    found = everything(source)
    assert found[2] == "field 'text' is empty"
    assert found[4] == "field 'text' holds only whitespace"
    good = [i for i, text in enumerate(TEXTS) if text.strip()]
    assert [tokenizer.decode(found[i]) for i in good] == [TEXTS[i] for i in good]
    assert max(max(found[i]) for i in good) < 300  # the special token's name is text
    assert source.place(3) == "a.jsonl:4"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_gives_what_jsonl_gives_in_any_order_over_row_groups_and_files(tmp_path, tokenizer, kind):
    texts = [*TEXTS, None, "letzter"]
    plain = open_texts([write_jsonl(tmp_path / "a.jsonl", "text", texts)], tokenizer, vocab_size=VOCAB)
    (tmp_path / "parts").mkdir()
    write_parquet(tmp_path / "parts" / "0.parquet", "text", texts[:5], kind, row_group_size=2)
    write_parquet(tmp_path / "parts" / "1.parquet", "text", texts[5:], kind, row_group_size=3)
    write_parquet(tmp_path / "parts" / "2.parquet", "text", [], kind)
    spooled = open_texts([str(tmp_path / "parts")], tokenizer, vocab_size=VOCAB)
    order = [8, 0, 7, 3, 6, 1, 5, 2, 4]
    assert everything(spooled, order) == everything(plain, order)
    assert [spooled.place(i) for i in (4, 5)] == ["0.parquet:5", "1.parquet:1"]


def test_text_in_parquet_that_is_no_utf8_is_a_bad_row(tmp_path, tokenizer):
    data = pa.py_buffer(b"gutschl\xe4cht")
    offsets = pa.py_buffer(np.array([0, 3, 11], np.int32).tobytes())
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = everything(open_texts([str(tmp_path / "a.parquet")], tokenizer, vocab_size=VOCAB))
    assert tokenizer.decode(found[0]) == "gut"
    assert found[1] == "field 'text' is not UTF-8: byte 0xe4 at position 4"


IDS = [[1, 2, 3], [], [4] * 9, None, [302]]
LISTS = [pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.uint16())]


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_lists_of_ids_are_read_as_they_are(tmp_path, kind):
    paths = [
        write_jsonl(tmp_path / "a.jsonl", "input_ids", IDS),
        write_parquet(tmp_path / "a.parquet", "input_ids", IDS, kind, row_group_size=2),
    ]
    found = [everything(open_tokens([path])) for path in paths]
    absent = "field 'input_ids' holds NoneType; expected a list of token ids"
    assert found == [[[1, 2, 3], "no tokens in it", [4] * 9, absent, [302]]] * 2


def test_lists_of_fixed_size_are_read_too(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", "ids", [[1, 2], [3, 4]], pa.list_(pa.int32(), 2))
    assert everything(open_tokens([path], field="ids")) == [[1, 2], [3, 4]]


def test_rows_of_jsonl_that_hold_no_ids_say_why(tmp_path):
    rows = [{"input_ids": [1]}, {"input_ids": "1 2"}, {"text": "a"}, {"input_ids": [1.5]}, {"input_ids": [[1], [2, 3]]}]
    rows += [{"input_ids": [True]}, {"input_ids": [[1]]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{oops\n")
    first, *others = everything(open_tokens([str(path)]))
    assert first == [1]
    said = ["holds str", "is missing", "holds float64", "no list of", "holds bool", "of shape (1, 1)", "not JSON"]
    for part, reason in zip(said, others, strict=True):
        assert part in reason


def test_columns_that_are_not_what_was_asked_for_are_refused_at_once(tmp_path, tokenizer):
    numbers = write_parquet(tmp_path / "n.parquet", "text", [1, 2])
    with pytest.raises(ValueError, match=r"n\.parquet: column 'text' holds int64; expected text"):
        open_texts([numbers], tokenizer, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"column 'text' holds int64; expected lists of token ids"):
        open_tokens([numbers], field="text")
    with pytest.raises(ValueError, match=r"n\.parquet: no row among the first 1000 holds 'input_ids'"):
        open_tokens([numbers])
    with pytest.raises(ValueError, match="holds the column 'text'"):
        open_texts([write_parquet(tmp_path / "o.parquet", "other", ["a"])], tokenizer, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"column 'ids', row group 0: .*-100"):
        open_tokens([write_parquet(tmp_path / "m.parquet", "ids", [[1, -100]])], field="ids")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match=r"a\.txt: expected parquet or JSONL with lists of token ids"):
        open_tokens([str(tmp_path / "a.txt")])


def test_a_readme_beside_the_tables_is_not_trained_on(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", "text", TEXTS)
    (tmp_path / "README.md").write_text("# A dataset")
    with pytest.raises(ValueError, match=r"plain text \(README\.md\) beside tables \(a\.jsonl\)"):
        open_texts([str(tmp_path)], tokenizer, vocab_size=VOCAB)


def test_a_tokenizer_or_ids_beyond_the_vocabulary_are_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", "text", TEXTS)
    with pytest.raises(ValueError, match="makes ids up to 296, the model has rows for 296"):
        open_texts([path], tokenizer, vocab_size=296)
    source = open_tokens([write_parquet(tmp_path / "a.parquet", "input_ids", [[1, None, 3]])])
    opened = open_feed([source], row_length=4, rows=1, shards=1, seed=0, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"a\.parquet:1: token ids from 1 to 4294967295; .* 0\.\.302"):
        next(opened)


def test_names_are_one_corpus_or_with_weights_a_source_each(tmp_path, tokenizer):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", "text", ["a b", "c d"]) for name in "ab"]
    settings = {"vocab_size": VOCAB, "tokenizer": tokenizer}
    (both,) = open_sources(paths, **settings)
    assert len(both) == 4
    assert [len(s) for s in open_sources(paths, weights=[1, 2], **settings)] == [2, 2]
    made, texts = open_sources(["synthetic", paths[0]], weights=[1, 1], **settings)
    assert (made.name, texts.name) == ("synthetic", paths[0])
    ids = write_jsonl(tmp_path / "ids.jsonl", "ids", [[1], [2]])
    (tokens,) = open_sources([ids], vocab_size=VOCAB, token_field="ids")
    assert everything(tokens) == [[1], [2]]
    with pytest.raises(ValueError, match="synthetic beside other data"):
        open_sources(["synthetic", *paths], **settings)
    with pytest.raises(ValueError, match=r"1 weight\(s\) for 2 name\(s\)"):
        open_sources(paths, weights=[1], **settings)
    with pytest.raises(ValueError, match="texts need the model's tokenizer"):
        open_sources(paths, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="no data given"):
        open_sources([], **settings)


def test_shipped_texts_and_remote_addresses_feed_rows(tokenizer):
    with fsspec.filesystem("memory").open("memory://feed/a.jsonl", "w") as file:
        file.write(json.dumps({"text": "fox"}) + "\n")
    for name in ("demo", "memory://feed/a.jsonl"):
        sources = open_sources([name], vocab_size=VOCAB, tokenizer=tokenizer)
        opened = open_feed(sources, row_length=32, rows=2, shards=1, seed=0, vocab_size=VOCAB)
        tokens = next(opened).tokens
        assert tokens.shape == (2, 32)
    fox = tokenizer.encode("fox")
    np.testing.assert_array_equal(tokens.ravel(), np.resize(fox, 64))


def test_the_fingerprint_changes_with_content_field_and_tokenizer(tmp_path, tokenizer):
    def fingerprint(texts, field="text", tokenizer=tokenizer):
        path = write_jsonl(tmp_path / "a.jsonl", field, texts)
        source = open_texts([path], tokenizer, vocab_size=VOCAB, field=field)
        return open_feed([source], row_length=4, rows=1, shards=1, seed=0, vocab_size=VOCAB).fingerprint

    before = fingerprint(["one", "two"])
    assert differences(before, fingerprint(["one", "two"])) == []
    (line,) = differences(before, fingerprint(["one", "owt"]))
    assert line.startswith("sources.0.files.0.sha256: was")
    assert len(differences(before, fingerprint(["one", "two"], field="body"))) == 2  # the file's content as well
    other = load_tokenizer("demo")
    path = write_jsonl(tmp_path / "a.jsonl", "text", ["one", "two"])
    ours, theirs = (open_texts([path], t, vocab_size=1 << 20).fingerprint() for t in (tokenizer, other))
    (line,) = differences(ours, theirs)
    assert line.startswith("tokenizer: was")
