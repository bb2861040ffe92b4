"""The folder of features: what is written comes back, by document and by feature; what is damaged is refused."""

import json

import numpy as np
import pyarrow as pa
import pytest

from qscope_jax.data import store_files as files
from qscope_jax.data.assemble import VALUE_TYPES, TokenCodes, read_features
from qscope_jax.data.pooling import Rows
from qscope_jax.data.store import FeatureStore

D_SAE, K, PER_PART = 32, 3, 5


def info(per, parts=2):
    shapes = {"4": {"d_sae": D_SAE, "k": K}}
    return {
        **{"per": per, "layers": [4], "shapes": shapes, "parts": parts, "keep": {"lang": "string"}},
        **{"top": None, "values": "bfloat16" if per == "token" else "float32", "precision": "parity"},
    }


def token_part(rng):
    """Token ids, offsets, and a code whose last tokens use fewer than k slots."""
    lengths = rng.integers(1, 6, PER_PART)
    n = int(lengths.sum())
    idx = np.argsort(rng.random((n, D_SAE)), axis=1)[:, :K].astype(np.uint16)
    val = -np.sort(-rng.integers(1, 64, (n, K)).astype(np.float32) / 8, axis=1)
    idx[::3, 1:], val[::3, 1:] = 65535, 0
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return rng.integers(0, 99, n).astype(np.uint32), offsets, TokenCodes(idx, val.astype(VALUE_TYPES["bfloat16"]))


def pooled_part(rng):
    lengths = rng.integers(0, 9, PER_PART)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    features = np.concatenate([rng.permutation(D_SAE)[:n] for n in lengths]).astype(np.uint32)
    values = np.concatenate([-np.sort(-rng.random(n)) for n in lengths]).astype(np.float32)
    return Rows(offsets, features, values)


def make_store(folder, per, only=None):
    """Writes a store of two parts and returns what went in, part by part."""
    claimed = files.claim_folder(folder, info(per))
    mark, rng, written = files.fingerprint(claimed), np.random.default_rng(0), []
    for part in range(2):
        ids = [f"d{part}.{i}" for i in range(PER_PART)]
        facts = {"fingerprint": mark, "documents": PER_PART, "tokens": 7 * PER_PART}
        lengths, rows = np.full(PER_PART, 7, np.int32), {}
        if per == "token":
            tokens, offsets, code = written_part = token_part(rng)
            lengths, facts["tokens"] = np.diff(offsets).astype(np.int32), len(tokens)
        else:
            rows[4] = written_part = pooled_part(rng)
        written.append(written_part)
        if only not in (None, part):
            continue
        if per == "token":
            facts["acts_sha256"] = files.write_tokens(files.tokens_path(folder, part), tokens, offsets, {4: code}, mark)
        schema = pa.schema([("lang", pa.string())])
        numbers = {"n_tokens": lengths, "truncated": np.zeros(PER_PART, bool)}
        table = files.document_table(ids, {"lang": ["en"] * PER_PART}, schema, numbers, rows)
        files.write_documents(files.documents_path(folder, part), table, facts)
    return written


def test_pooled_features_come_back_by_document(tmp_path):
    written = make_store(tmp_path, "document")
    store = FeatureStore(tmp_path)
    assert len(store) == 2 * PER_PART
    assert store.documents().column("id").to_pylist()[PER_PART - 1 : PER_PART + 1] == ["d0.4", "d1.0"]
    for part, rows in enumerate(written):
        for i in range(PER_PART):
            document = store.document(store.find(f"d{part}.{i}"))
            begin, end = rows.offsets[i : i + 2]
            assert (document.id, document.kept, document.n_tokens) == (f"d{part}.{i}", {"lang": "en"}, 7)
            np.testing.assert_array_equal(document.features[4][0], rows.features[begin:end])
            np.testing.assert_array_equal(document.features[4][1], rows.values[begin:end])


def test_pooled_features_come_back_by_feature(tmp_path):
    written = make_store(tmp_path, "document")
    store, counted = FeatureStore(tmp_path), np.zeros(D_SAE, int)
    for feature in range(D_SAE):
        expected = []
        for part, rows in enumerate(written):
            row = np.repeat(np.arange(PER_PART), np.diff(rows.offsets))
            hit = rows.features == feature
            expected += zip(row[hit] + part * PER_PART, rows.values[hit], strict=True)
        hits = store.feature(4, feature)
        assert list(zip(hits.document, hits.value, strict=True)) == expected
        counted[feature] = len(expected)
    np.testing.assert_array_equal(store.firing(4), counted)
    assert counted.sum() > 0


def test_one_line_reads_a_store_in_pandas_or_any_parquet_reader(tmp_path):
    import pyarrow.parquet as pq

    make_store(tmp_path, "document")
    table = pq.read_table(tmp_path / "documents")
    assert table.column_names == ["id", "lang", "n_tokens", "truncated", "layer4_features", "layer4_values"]
    assert table.schema.field("layer4_features").type.value_type == pa.uint32()
    assert table.schema.field("layer4_values").type.value_type == pa.float32()
    assert table.num_rows == 2 * PER_PART


def test_token_codes_come_back_by_document(tmp_path):
    written = make_store(tmp_path, "token")
    store = FeatureStore(tmp_path)
    assert store.n_tokens == sum(len(tokens) for tokens, *_ in written)
    for part, (tokens, offsets, code) in enumerate(written):
        for i in range(PER_PART):
            document, at = store.document(part * PER_PART + i), slice(*offsets[i : i + 2])
            np.testing.assert_array_equal(document.tokens, tokens[at])
            np.testing.assert_array_equal(document.codes[4].val, code.val[at].astype(np.float32))
            used = document.codes[4].val > 0
            np.testing.assert_array_equal(document.codes[4].idx[used], code.idx[at][used])
            assert not document.codes[4].idx[~used].any()


def test_token_codes_come_back_by_feature(tmp_path):
    written = make_store(tmp_path, "token")
    store, counted = FeatureStore(tmp_path), np.zeros(D_SAE, int)
    for feature in range(D_SAE):
        expected = []
        for part, (tokens, offsets, code) in enumerate(written):
            for i in range(PER_PART):
                for t in range(offsets[i], offsets[i + 1]):
                    for f, v in zip(code.idx[t], code.val[t], strict=True):
                        if f == feature and v > 0:
                            expected.append((part * PER_PART + i, float(v), t - offsets[i], tokens[t]))
        hits = store.feature(4, feature)
        assert list(zip(*hits, strict=True)) == expected
        counted[feature] = len(expected)
    np.testing.assert_array_equal(store.firing(4), counted)


def test_what_is_not_there_is_refused(tmp_path):
    make_store(tmp_path, "document")
    store = FeatureStore(tmp_path)
    with pytest.raises(IndexError, match="document 10; the store has 10"):
        store.document(10)
    with pytest.raises(KeyError, match=r"no document is called 'x'.*errors\.jsonl"):
        store.find("x")
    with pytest.raises(ValueError, match=r"layer 3; .* holds the layers 4"):
        store.feature(3, 0)
    with pytest.raises(ValueError, match="feature 32; layer 4 has 32"):
        store.feature(4, 32)
    with pytest.raises(ValueError, match="use rows"):
        next(store.token_codes(4))


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no store\.json"):
        FeatureStore(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store\.json is damaged"):
        FeatureStore(tmp_path)
    (tmp_path / "store.json").write_text('{"kind": "other"}')
    with pytest.raises(ValueError, match="expected a JSON object of kind"):
        FeatureStore(tmp_path)


def test_features_beyond_the_width_are_refused(tmp_path):
    make_store(tmp_path, "document")
    store = FeatureStore(tmp_path)
    store.info["shapes"]["4"]["d_sae"] = D_SAE - 9
    with pytest.raises(ValueError, match=r"part-0000\d\.parquet: feature \d+ of 23"):
        store.firing(4)


def test_missing_parts_are_named_and_can_be_done_without(tmp_path):
    make_store(tmp_path, "document", only=1)
    with pytest.raises(FileNotFoundError, match="1 of 2 parts are missing, the first is 0"):
        FeatureStore(tmp_path)
    store = FeatureStore(tmp_path, partial=True)
    assert store.documents().column("id").to_pylist() == [f"d1.{i}" for i in range(PER_PART)]
    assert store.document(0).id == "d1.0"


def test_parts_of_another_run_are_refused(tmp_path):
    make_store(tmp_path / "a", "document")
    make_store(tmp_path / "b", "token")
    paths = [files.documents_path(tmp_path / name, 1) for name in "ab"]
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(ValueError, match=r"part-00001\.parquet belongs to another run"):
        FeatureStore(tmp_path / "a")


@pytest.mark.parametrize("per", ["document", "token"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped"])
def test_damaged_files_are_named(tmp_path, per, damage):
    make_store(tmp_path, per)
    path = files.tokens_path(tmp_path, 1) if per == "token" else files.documents_path(tmp_path, 1)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-9 if per == "token" else 60] ^= 1
    path.write_bytes(content[: {"cut": len(content) // 2, "emptied": 0, "flipped": len(content)}[damage]])
    with pytest.raises(ValueError, match=path.name):
        FeatureStore(tmp_path).verify()


def test_a_missing_or_foreign_file_of_codes_is_named(tmp_path):
    make_store(tmp_path, "token")
    first, second = (files.tokens_path(tmp_path, part) for part in range(2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"acts-00001\.safetensors: (tok|layer4)"):
        FeatureStore(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"acts-00001\.safetensors is missing"):
        FeatureStore(tmp_path)


def test_a_folder_is_claimed_once_and_differences_are_named(tmp_path):
    first = files.claim_folder(tmp_path, {**info("token"), "measured_sinks": {"4": 3.5}})
    again = files.claim_folder(tmp_path, {**info("token"), "measured_sinks": {"4": 3.6}})
    assert again == first
    with pytest.raises(ValueError, match="another run") as error:
        files.claim_folder(tmp_path, {**info("token", parts=3), "values": "float32"})
    assert 'values: the folder has "bfloat16", this run "float32"' in str(error.value)
    assert "parts: the folder has 2, this run 3" in str(error.value)
    assert json.loads((tmp_path / "store.json").read_text()) == first


def test_equal_parts_are_equal_bytes(tmp_path):
    for name in "ab":
        make_store(tmp_path / name, "token")
    for path in (tmp_path / "a").rglob("*-0000*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_lists_of_features_name_features_of_all_or_of_one_layer(tmp_path):
    path = tmp_path / "features.txt"
    path.write_text("# languages\n3\n4 7  # layer 4 only\n5, 0\n\n")
    assert read_features(path, {4: 8, 5: 8}) == {4: [3, 7], 5: [0, 3]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [("x\n", ":1: expected FEATURE"), ("1\n-2\n", ":2: expected"), ("1 2 3\n", ":1: expected"), ("9 1\n", "layer 9"),
     ("8\n", "feature 8 of layer 4, which has 8"), ("# none\n", "no feature")],
)  # fmt: skip
def test_lists_of_features_that_do_not_fit_are_refused(tmp_path, content, reason):
    path = tmp_path / "features.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_features(path, {4: 8})
