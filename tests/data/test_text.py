"""A corpus: every row of every file is a document or an error with file, line and reason; none is lost or invented."""

import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qscope_jax.data.inputs import find_files
from qscope_jax.data.text import Corpus, Fields, open_corpus


def lines(*rows):
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def everything(corpus: Corpus):
    documents, bad = corpus.read(0, len(corpus))
    assert sorted([d.number for d in documents] + [b.number for b in bad]) == list(range(len(corpus)))
    return documents, bad


def only_fault(corpus: Corpus) -> str:
    documents, bad = everything(corpus)
    assert not documents
    (fault,) = bad
    return fault.reason


def test_documents_are_called_file_and_line(tmp_path):
    write(tmp_path, "in/a.jsonl", lines({"text": "one"}, {"text": "two"}))
    write(tmp_path, "in/deep/b.txt", b"three\nfour")
    write(tmp_path, "in/.hidden/c.txt", b"not read")
    write(tmp_path, "in/readme.rst", b"not read")
    documents, bad = everything(open_corpus([str(tmp_path / "in")]))
    assert [(d.id, d.text) for d in documents] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:2", "two"),
        ("deep/b.txt:1", "three"),
        ("deep/b.txt:2", "four"),
    ]
    assert bad == []


def test_globs_and_names_may_overlap_and_every_file_is_read_once(tmp_path):
    for name in "ba":
        write(tmp_path, f"{name}.txt", name.encode())
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path / "*.txt")])
    assert [file.name for file in found] == ["b.txt", "a.txt"]


def test_links_such_as_those_of_the_hubs_cache_keep_their_own_name(tmp_path):
    blob = write(tmp_path, "blobs/0123abcd", lines({"text": "one"}))
    (tmp_path / "train.jsonl").symlink_to(blob)
    assert [d.id for d in everything(open_corpus([str(tmp_path / "train.jsonl")]))[0]] == ["train.jsonl:1"]


def test_remote_addresses_are_read_through_fsspec(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("QSCOPE_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for name in ("x.jsonl", "y.jsonl", "z.txt"):
        memory.pipe(f"/texts/{name}", lines({"text": name}))
    documents, _ = everything(open_corpus(["memory://texts/*.jsonl"]))
    assert [d.text for d in documents] == ["x.jsonl", "y.jsonl"]


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", lambda b: pa.compress(b, codec="zstd", asbytes=True))],
)
def test_compressed_files_are_read_and_damaged_ones_refused(tmp_path, ending, pack):
    content = lines(*({"text": f"text {i}"} for i in range(300)))
    documents, _ = everything(open_corpus([write(tmp_path, f"a.jsonl{ending}", pack(content))]))
    assert [d.text for d in documents] == [f"text {i}" for i in range(300)]
    cut = write(tmp_path, f"cut.jsonl{ending}", pack(content)[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl.*damaged or cut short"):
        open_corpus([cut])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("\n", "blank line"),
        ("   \r\n", "blank line"),
        ({"text": ""}, "'text' is empty"),
        ({"text": " \t\n"}, "only whitespace"),
        ({"text": "a\0b"}, "NUL"),
        ({"text": "\ud800 half"}, "half a surrogate pair"),
        ({"other": "x"}, "'text' is missing"),
        ({"text": None}, "holds null; expected a text"),
        ({"text": 3}, "holds int; expected a text"),
        ({"text": ["a"]}, "holds list; expected a text"),
        ('{"text": "cut', "not JSON: Unterminated string"),
        ('["text"]\n', "expected a JSON object per line, found list"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "nested too deeply"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}\n", "not readable JSON: Exceeds the limit"),
    ],
)
def test_a_bad_row_is_an_error_of_its_own(tmp_path, row, reason):
    path = write(tmp_path, "a.jsonl", lines({"text": "before"}, row))
    corpus = open_corpus([path])
    documents, (fault,) = everything(corpus)
    assert [d.text for d in documents] == ["before"]
    assert (fault.number, fault.file, fault.line, fault.id) == (1, "a.jsonl", 2, "a.jsonl:2")
    assert reason in fault.reason


def test_bytes_that_are_no_utf8_are_named_by_position(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"text": "caf\xe9"}\n{"text": "good"}\n')
    documents, (fault,) = everything(open_corpus([path]))
    assert [d.text for d in documents] == ["good"]
    assert fault.reason == "not UTF-8: byte 0xe9 at position 13"


def test_bom_and_crlf_are_not_part_of_the_text(tmp_path):
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo \r\n")
    assert [d.text for d in everything(open_corpus([path]))[0]] == ["one", "two "]
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n')
    assert [d.text for d in everything(open_corpus([path]))[0]] == ["one"]


def test_a_line_of_50_mb_is_an_error_and_never_in_memory(tmp_path):
    path = write(tmp_path, "a.txt", b"x" * 50_000_000 + b"\nshort\n")
    corpus = open_corpus([path], max_row_bytes=1 << 20)
    documents, (fault,) = everything(corpus)
    assert [d.text for d in documents] == ["short"]
    assert fault.reason.startswith("50,000,001 bytes; expected at most 1,048,576")


def test_a_whole_text_file_can_be_one_document(tmp_path):
    write(tmp_path, "a.txt", b"one\ntwo\n")
    write(tmp_path, "b.md", b"# three\n")
    documents, _ = everything(open_corpus([str(tmp_path)], document="file"))
    assert [d.text for d in documents] == ["one\ntwo\n", "# three\n"]


def test_empty_files_have_no_rows(tmp_path):
    corpus = open_corpus([write(tmp_path, "a.jsonl", b""), write(tmp_path, "b.jsonl", lines({"text": "one"}))])
    assert len(corpus) == 1
    assert everything(corpus)[0][0].id == "b.jsonl:1"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", "text\n".encode("utf-16"), "UTF-16"),
        ("a.jsonl", gzip.compress(b"text"), "is compressed"),
        ("a.parquet", b"<html>not found</html>", "expected a parquet file, found an HTML"),
        ("a.parquet", b"PAR1 cut short", "damaged or cut short parquet"),
        ("a.rst", b"text", "unknown kind of data"),
    ],
)
def test_a_file_that_is_something_else_is_refused_by_name(tmp_path, name, content, reason):
    with pytest.raises(ValueError, match=reason) as error:
        open_corpus([write(tmp_path, name, content)])
    assert name in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\*\.jsonl"):
        open_corpus([str(tmp_path / "nothing*.jsonl")])
    with pytest.raises(ValueError, match="no data given"):
        open_corpus([])


def test_ids_come_from_a_column_and_repeated_ones_are_errors(tmp_path):
    rows = [{"id": "a", "text": "1"}, {"id": 7, "text": "2"}, {"id": "a", "text": "3"}, {"id": "7", "text": "4"}]
    path = write(tmp_path, "a.jsonl", lines(*rows))
    documents, bad = everything(open_corpus([path], Fields(id="id")))
    assert [d.id for d in documents] == ["a", "7"]
    assert [(b.id, b.line, b.reason) for b in bad] == [
        ("a", 3, "id 'a' is already the id of a.jsonl:1"),
        ("7", 4, "id '7' is already the id of a.jsonl:2"),
    ]


@pytest.mark.parametrize("value", [None, True, 1.5, [1], "", 1 << 63, "\ud800"])
def test_what_is_no_id_is_an_error(tmp_path, value):
    path = write(tmp_path, "a.jsonl", lines({"id": value, "text": "good"}))
    assert "'id'" in only_fault(open_corpus([path], Fields(id="id")))


def test_duplicates_are_found_across_files_whatever_part_is_read(tmp_path):
    paths = [write(tmp_path, f"{i}.jsonl", lines({"id": "same", "text": "x"})) for i in range(3)]
    corpus = open_corpus(paths, Fields(id="id"))
    assert corpus.read(2, 3)[1][0].reason == "id 'same' is already the id of 0.jsonl:1"
    assert corpus.read(0, 1)[0][0].id == "same"


def test_columns_are_carried_with_the_type_of_the_first_rows(tmp_path):
    rows = [
        {"text": "a", "n": 1, "x": 1, "s": "u", "tags": ["p", "q"], "flag": True},
        {"text": "b", "n": 2, "x": 2.5, "s": None, "tags": {"k": 1}},
    ]
    corpus = open_corpus([write(tmp_path, "a.jsonl", lines(*rows))], Fields(keep=("n", "x", "s", "tags", "flag")))
    kinds = {field.name: str(field.type) for field in corpus.schema}
    assert kinds == {"n": "int64", "x": "double", "s": "string", "tags": "string", "flag": "bool"}
    documents, _ = everything(corpus)
    assert documents[0].kept == (1, 1, "u", '["p", "q"]', True)
    assert documents[1].kept == (2, 2.5, None, '{"k": 1}', None)


@pytest.mark.parametrize("value", ["text", 1.5, True, 1 << 63, [1]])
def test_a_carried_value_of_another_type_is_an_error(tmp_path, value):
    path = write(
        tmp_path, "a.jsonl", lines({"text": "a", "n": 1}, *[{"text": "b", "n": 2}] * 1000, {"text": "c", "n": value})
    )
    documents, (fault,) = everything(open_corpus([path], Fields(keep=("n",))))
    assert len(documents) == 1001
    assert "'n' holds" in fault.reason


def test_a_carried_column_that_no_row_has_is_refused(tmp_path):
    path = write(tmp_path, "a.jsonl", lines({"text": "a"}))
    with pytest.raises(ValueError, match=r"'lang' of --keep"):
        open_corpus([path], Fields(keep=("lang",)))


def parquet(folder, name, columns, **options):
    path = folder / name
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def test_parquet_is_read_across_row_groups_with_its_own_types(tmp_path):
    texts = [f"text {i}" for i in range(25)]
    days = pa.array(range(25), pa.date32())
    path = parquet(tmp_path, "a.parquet", {"body": texts, "day": days, "unused": texts}, row_group_size=10)
    corpus = open_corpus([path], Fields(text="body", keep=("day",)))
    documents, _ = everything(corpus)
    assert [d.text for d in documents] == texts
    assert [d.id for d in corpus.read(8, 12)[0]] == [f"a.parquet:{i}" for i in range(9, 13)]
    assert corpus.schema.field("day").type == pa.date32()
    assert documents[3].kept[0].isoformat() == "1970-01-04"


def test_dictionary_encoded_texts_are_texts(tmp_path):
    path = parquet(tmp_path, "a.parquet", {"text": pa.array(["a", "b", "a"]).dictionary_encode()})
    assert [d.text for d in everything(open_corpus([path]))[0]] == ["a", "b", "a"]


def test_files_of_another_schema_are_errors_row_by_row(tmp_path):
    paths = [
        parquet(tmp_path, "a.parquet", {"text": ["good", None], "n": [1, 2]}),
        parquet(tmp_path, "b.parquet", {"text": [1, 2], "n": [3, 4]}),
        parquet(tmp_path, "c.parquet", {"body": ["x"], "n": [5]}),
        parquet(tmp_path, "d.parquet", {"text": ["good", "n is text here"], "n": [None, "six"]}),
    ]
    documents, bad = everything(open_corpus(paths, Fields(keep=("n",))))
    assert [d.id for d in documents] == ["a.parquet:1", "d.parquet:1"]
    assert [(b.file, b.line) for b in bad] == [
        ("a.parquet", 2),
        ("b.parquet", 1),
        ("b.parquet", 2),
        ("c.parquet", 1),
        ("d.parquet", 2),
    ]
    assert "expected a text" in bad[1].reason
    assert "'text' is missing" in bad[3].reason
    assert "'n' holds" in bad[4].reason


def test_parquet_texts_that_are_no_utf8_are_errors_of_their_row(tmp_path):
    raw = pa.array([b"good", b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    documents, (fault,) = everything(open_corpus([parquet(tmp_path, "a.parquet", {"text": text})]))
    assert [d.text for d in documents] == ["good"]
    assert "not UTF-8: byte 0xe9 at position 3" in fault.reason


def test_a_damaged_page_of_parquet_stops_with_the_name_of_the_file(tmp_path):
    texts = [f"text number {i}" for i in range(500)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, write_page_checksum=True, compression="none")
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: row group 0 is damaged"):
        everything(open_corpus([str(path)]))


def test_parts_cover_the_corpus_and_depend_on_its_content_alone(tmp_path):
    rows = [{"text": "x" * (i * 7 % 90 + 1)} for i in range(200)]
    path = write(tmp_path, "a.jsonl", lines(*rows))
    parts = open_corpus([path]).parts(rows=40, size=2000)
    assert parts == open_corpus([path]).parts(rows=40, size=2000)
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == 200
    assert all(0 < stop - start <= 40 for start, stop in parts)
    sizes = [len(json.dumps(row)) + 1 for row in rows]
    assert all(sum(sizes[start:stop]) <= 2000 for start, stop in parts)
    assert open_corpus([path]).parts(rows=40, size=1) == [(i, i + 1) for i in range(200)]


def test_any_range_gives_the_rows_of_the_whole(tmp_path):
    paths = [write(tmp_path, f"{n}.jsonl", lines(*({"text": f"{n}.{i}"} for i in range(n)))) for n in (3, 0, 5, 1)]
    corpus = open_corpus(paths)
    whole, _ = corpus.read(0, len(corpus))
    for start in range(len(corpus)):
        for stop in range(start, len(corpus) + 1):
            assert corpus.read(start, stop)[0] == whole[start:stop]


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write(folder, "a.jsonl", lines({"text": "a"}))
    assert open_corpus([str(one)]).fingerprint() == open_corpus([str(two)]).fingerprint()
    write(two, "a.jsonl", lines({"text": "b"}))
    assert open_corpus([str(one)]).fingerprint() != open_corpus([str(two)]).fingerprint()


def test_one_odd_value_in_a_carried_column_costs_its_own_row_alone(tmp_path):
    rows = [{"text": "x", "year": 2000 + i} for i in range(20)]
    rows[3]["year"] = "unknown"
    path = write(tmp_path, "a.jsonl", lines(*rows))
    documents, bad = everything(open_corpus([path], Fields(keep=("year",))))
    assert [d.kept for d in documents] == [(2000 + i,) for i in range(20) if i != 3]
    assert [row.line for row in bad] == [4]


@pytest.mark.parametrize(
    ("fields", "option"), [(Fields(text="body"), "--text-field"), (Fields(id="uid"), "--id-field")]
)
def test_a_column_that_no_row_has_is_a_wrong_name_and_not_a_corpus_of_bad_rows(tmp_path, fields, option):
    path = write(tmp_path, "a.jsonl", lines({"text": "one"}, {"text": "two"}))
    with pytest.raises(ValueError, match=f"of {option}"):
        open_corpus([path], fields)
