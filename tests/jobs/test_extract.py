"""`qscope extract` from end to end: right numbers, every row once, nothing lost however often it is stopped."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from qscope_jax import cli
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.store import FeatureStore
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.jobs import extract as job
from qscope_jax.jobs.places import parse_shard
from qscope_jax.jobs.run import EXIT_INTERRUPTED, Run
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import encode
from tests.jobs.extracting import (
    check_exactly_once,
    command,
    damaged_rows,
    extract,
    manifest,
    results,
    start,
    stop_when,
    texts,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def dense(tiny_release):
    """A function from a text to its dense activations per layer [n_tokens, d_sae], computed one text at a time."""
    backbone = load_backbone(tiny_release / "model", dtype="float32")
    saes = load_saes(tiny_release / "sae", (0, 1))
    encoder = make_encoder(load_tokenizer(tiny_release / "model"))

    @jax.jit
    def look(tokens, mask):
        residual = forward(backbone.params, backbone.config, tokens, mask=mask, capture=(0, 1)).captured[:, 0]
        return [encode(saes[layer], residual[layer]) for layer in (0, 1)]

    def activations(text, limit=32):
        tokens = encoder([text])[0][:limit]
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        found = []
        for code in look(padded, np.arange(32)[None] < len(tokens)):
            z = np.zeros((32, 64), np.float32)
            np.put_along_axis(z, np.asarray(code.indices), np.asarray(code.values), axis=1)
            found.append(z[: len(tokens)])
        return found

    return activations


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """Fifty texts, one of a single token and one longer than the context."""
    rows = texts(48)
    rows = ["x", *rows, "the quick brown fox " * 20]
    return rows, write_rows(tmp_path_factory.mktemp("data") / "fifty.jsonl", [{"text": text} for text in rows])


POOLS = {
    "max": lambda z: z.max(axis=0),
    "mean": lambda z: z.mean(axis=0),
    "count": lambda z: (z > 0).sum(axis=0),
    "last": lambda z: z[-1],
}


@pytest.mark.parametrize("pool", POOLS)
def test_pooled_features_equal_brute_force(tiny_release, fifty, dense, tmp_path, pool):
    rows, data = fifty
    store = extract(tiny_release, data, tmp_path / "out", "--pool", pool, "--precision", "parity")
    assert len(store) == len(rows)
    for number, text in enumerate(rows):
        document = store.document(number)
        assert document.id == f"fifty.jsonl:{number + 1}"
        for layer, z in enumerate(dense(text)):
            assert document.n_tokens == len(z)
            found = np.zeros(64)
            found[document.features[layer][0]] = document.features[layer][1]
            np.testing.assert_allclose(found, POOLS[pool](z), rtol=1e-3, atol=1e-4)
            assert (np.diff(document.features[layer][1]) <= 0).all()
    assert [store.document(i).truncated for i in (0, len(rows) - 1)] == [False, True]
    assert store.document(0).n_tokens == 1
    assert store.document(len(rows) - 1).n_tokens == 32


def test_codes_of_tokens_equal_brute_force(tiny_release, fifty, dense, tmp_path):
    rows, data = fifty
    store = extract(tiny_release, data, tmp_path / "out", "--per", "token", "--precision", "parity")
    store.verify()
    for number in (0, 7, 20, len(rows) - 1):
        document = store.document(number)
        for layer, z in enumerate(dense(rows[number])):
            found = np.zeros_like(z)
            np.put_along_axis(found, document.codes[layer].idx, document.codes[layer].val, axis=1)
            np.testing.assert_allclose(found, z, rtol=1e-3, atol=1e-4)
    assert store.n_tokens == sum(len(dense(text)[0]) for text in rows)


def test_windows_cover_a_long_document_whole(tiny_release, fifty, dense, tmp_path):
    rows, data = fifty
    options = ("--long", "window", "--pool", "count", "--precision", "parity")
    document = extract(tiny_release, data, tmp_path / "out", *options).document(len(rows) - 1)
    tokens = len(make_encoder(load_tokenizer(tiny_release / "model"))([rows[-1]])[0])
    assert (document.n_tokens, document.truncated) == (tokens, False)
    assert tokens > 64
    assert document.features[0][1].sum() == 4 * tokens  # k = 4 features fire at every token, each token counts once
    per_token = extract(tiny_release, data, tmp_path / "token", "--long", "window", "--per", "token", "--overlap", "8")
    assert len(per_token.document(len(rows) - 1).tokens) == tokens


def test_top_minimum_and_a_list_of_features(tiny_release, fifty, dense, tmp_path):
    rows, data = fifty
    (tmp_path / "list.txt").write_text("\n".join(map(str, range(0, 64, 2))))
    options = ("--top", "3", "--min-value", "0.5", "--features", str(tmp_path / "list.txt"), "--precision", "parity")
    store = extract(tiny_release, data, tmp_path / "out", *options, "--layers", "1")
    assert store.layers == (1,)
    sizes = []
    for number, text in enumerate(rows):
        best = dense(text)[1].max(axis=0)[::2]
        features, values = store.document(number).features[1]
        sizes.append(len(features))
        assert len(features) == min(3, (best >= 0.5).sum())
        assert (features % 2 == 0).all()
        np.testing.assert_allclose(values, np.sort(best)[::-1][: len(features)], rtol=1e-3, atol=1e-4)
    assert max(sizes) == 3


def test_masked_sinks_are_left_out_and_reported_and_every_shard_uses_the_same_threshold(tiny_release, fifty, tmp_path):
    _, data = fifty
    out = tmp_path / "out"
    options = ("--mask-sinks", "--precision", "parity", "--part-rows", "10")
    whole = extract(tiny_release, data, tmp_path / "whole", *options)
    assert set(whole.info["measured_sinks"]) == {"0", "1"}
    assert manifest(tmp_path / "whole")["counts"]["masked_share"] == {"0": 0.0, "1": 0.0}
    for shard in ("1/2", "0/2"):
        assert cli.main(command(tiny_release, data, out, *options, "--shard", shard)) == 0
    assert results(out) == results(tmp_path / "whole")
    strict = json.loads((out / "store.json").read_text())
    strict["measured_sinks"] = {"0": 1e-6, "1": 1e9}
    (tmp_path / "strict").mkdir()
    (tmp_path / "strict/store.json").write_text(json.dumps(strict))
    masked = extract(tiny_release, data, tmp_path / "strict", *options)
    assert manifest(tmp_path / "strict")["counts"]["masked_share"] == {"0": 1.0, "1": 0.0}
    assert [len(masked.document(3).features[layer][0]) > 0 for layer in (0, 1)] == [False, True]


def test_a_remote_folder_for_results_is_refused_and_none_of_that_name_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["extract", "demo", "--out", "gs://bucket/x"]) == cli.EXIT_ERROR
    assert "needs a local folder, since its processes share the folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_what_was_done_and_how(tiny_release, fifty, tmp_path):
    rows, data = fifty
    extract(tiny_release, data, tmp_path / "out")
    found = manifest(tmp_path / "out")
    assert found["state"] == "complete"
    assert found["mode"] == "bfloat16 (fast mode)"
    counts = found["counts"]
    lengths = [len(ids) for ids in make_encoder(load_tokenizer(tiny_release / "model"))(rows)]
    assert (counts["documents"], counts["bad"]) == (50, 0)
    assert counts["truncated"] == sum(n > 32 for n in lengths) > 0
    assert counts["tokens"] == sum(min(n, 32) for n in lengths)
    assert counts["wasted_positions"] == pytest.approx(1 - counts["tokens"] / counts["positions"])
    assert 0 < counts["sharing"] <= 50
    assert found["compilations"] == len({tuple(shape) for shape in found["shapes"]})
    assert set(found["store"]["model"]["files"]) == {"config.json", "model.safetensors"}
    assert all(len(digest) == 64 for digest in found["store"]["sae"]["files"].values())
    assert found["store"]["data"][0]["name"] == "fifty.jsonl"


def test_fast_and_parity_mode_agree_on_most_features(tiny_release, fifty, tmp_path):
    _, data = fifty
    shares = []
    stores = [extract(tiny_release, data, tmp_path / p, "--precision", p, "--per", "token") for p in ("fast", "parity")]
    for number in range(len(stores[0])):
        fast, parity = (store.document(number).codes[1] for store in stores)
        shares += [len(np.intersect1d(a, b)) / 4 for a, b in zip(fast.idx, parity.idx, strict=True)]
    assert 0.9 < np.mean(shares) <= 1


def test_a_rerun_makes_only_what_is_missing(tiny_release, tmp_path):
    data = write_rows(tmp_path / "a.jsonl", damaged_rows(60, 10)[0])
    out, options = tmp_path / "out", ("--part-rows", "20", "--id-field", "id", "--keep", "n")
    extract(tiny_release, data, out, *options)
    before = results(out)
    (out / "documents/part-00001.parquet").unlink()
    stays = [out / f"documents/part-0000{part}.parquet" for part in (0, 2)]
    inodes = [path.stat().st_ino for path in stays]
    extract(tiny_release, data, out, *options)
    assert [path.stat().st_ino for path in stays] == inodes
    assert results(out) == before


def test_another_run_into_the_same_folder_is_refused_and_differences_are_named(tiny_release, fifty, tmp_path, capsys):
    _, data = fifty
    out = tmp_path / "out"
    extract(tiny_release, data, out)
    before = results(out)
    other = write_rows(tmp_path / "fifty.jsonl", [{"text": "other"}])
    assert cli.main(command(tiny_release, other, out, "--top", "5")) == 2
    told = capsys.readouterr().err
    assert "top: the folder has null, this run 5" in told
    assert "data" in told
    assert "rows: the folder has 50, this run 1" in told
    assert results(out) == before


def test_a_bad_row_can_stop_the_run_instead(tiny_release, tmp_path, capsys):
    data = write_rows(tmp_path / "a.jsonl", [{"text": "good"}, {"text": 3}])
    assert cli.main(command(tiny_release, data, tmp_path / "out", "--on-error", "fail")) == 2
    assert "a.jsonl:2: field 'text' holds int; expected a text (--on-error skip" in capsys.readouterr().err
    assert manifest(tmp_path / "out")["state"] == "failed"
    assert not list((tmp_path / "out").glob("documents/*"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--layers", "5"), "layer 5"),
        (("--layers", "0", "0"), "named twice"),
        (("--keep", "id"), "--keep id"),
        (("--keep", "absent"), "'absent' of --keep"),
        (("--shard", "2/2"), "expected I/N"),
        (("--overlap", "32"), "--overlap 32"),
        (("--max-length", "65"), "the model's context is 64"),
        (("--min-value", "nan"), "--min-value nan"),
        (("--batch-tokens=-1",), "--batch-tokens -1"),
        (("--top", "0"), "--top 0"),
        (("--part-rows", "0"), "--part-rows 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_and_leave_no_store(tiny_release, fifty, tmp_path, capsys, options, reason):
    assert cli.main(command(tiny_release, fifty[1], tmp_path / "out", *options)) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out/store.json").exists()


def test_an_sae_that_is_replaced_between_hash_and_load_is_noticed(tiny_release, fifty, tmp_path, capsys, monkeypatch):
    sae = tmp_path / "sae"
    shutil.copytree(tiny_release / "sae", sae)
    load = job.load_backbone

    def slow_load(*arguments, **options):
        (path,) = sae.glob("layer1*")
        os.utime(path, ns=(0, 0))
        return load(*arguments, **options)

    monkeypatch.setattr(job, "load_backbone", slow_load)
    arguments = command(tiny_release, fifty[1], tmp_path / "out")
    assert cli.main([*arguments, "--sae", str(sae)]) == 2
    assert "was replaced while this command began" in capsys.readouterr().err
    assert not (tmp_path / "out/store.json").exists()


def test_files_without_rows_are_refused(tiny_release, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    assert cli.main(command(tiny_release, tmp_path / "empty.jsonl", tmp_path / "out")) == 2
    assert "no rows; every file is empty" in capsys.readouterr().err


def test_input_of_bad_rows_only_gives_empty_tables_and_a_full_list(tiny_release, tmp_path):
    data = write_rows(tmp_path / "a.jsonl", [{"text": ""}, "no json\n"])
    store = extract(tiny_release, data, tmp_path / "out", "--per", "token")
    assert len(store) == 0
    assert len((tmp_path / "out/errors.jsonl").read_text().splitlines()) == 2
    assert manifest(tmp_path / "out")["counts"]["documents"] == 0


def test_a_mesh_writes_the_features_of_one_device(tiny_release, fifty, tmp_path):
    rows, data = fifty
    options = ("--per", "token", "--precision", "parity")
    alone = extract(tiny_release, data, tmp_path / "alone", *options)
    store = extract(tiny_release, data, tmp_path / "mesh", *options, "--mesh", "4x2")
    assert "mesh" not in alone.info
    assert store.info["mesh"] == {"data": 4, "model": 2}
    told = manifest(tmp_path / "mesh")
    assert {shape[0] % 4 for shape in told["shapes"]} == {0}
    assert told["device"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    for number in range(len(rows)):
        for layer in (0, 1):
            one, other = (s.document(number).codes[layer] for s in (alone, store))
            np.testing.assert_allclose(one.val, other.val, rtol=1e-4, atol=1e-5)
            assert (one.idx == other.idx).mean() > 0.99
    assert cli.main(command(tiny_release, data, tmp_path / "mesh", *options)) == 2  # other arithmetic, by rounding


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--mesh", "4"), "--mesh 4: expected DATAxMODEL"),
        (("--mesh", "0x2"), "--mesh 0x2"),
        (("--mesh", "4x4"), "needs 16 devices, not 8"),
        (("--mesh", "2x4"), "heads = 2 cannot be split"),
        (("--processes", "2"), "--coordinator, --process missing"),
    ],
)
def test_places_that_do_not_exist_are_refused_before_weights_are_read(
    tiny_release, fifty, tmp_path, capsys, monkeypatch, options, reason
):
    monkeypatch.setattr(job, "load_backbone", None)
    assert cli.main(command(tiny_release, fifty[1], tmp_path / "out", *options)) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out/store.json").exists()


def test_shards_are_numbered_from_zero():
    assert parse_shard("1/2") == (1, 2)
    for text in ("2/2", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(ValueError, match="expected I/N"):
            parse_shard(text)


@pytest.mark.parametrize("per", ["document", "token"])
def test_a_run_that_is_stopped_saves_its_batches_and_ends_with_the_same_bytes(tiny_release, tmp_path, monkeypatch, per):
    rows, bad = damaged_rows(300, 50)
    data = write_rows(tmp_path / "a.jsonl", rows)
    options = ("--id-field", "id", "--keep", "n", "--per", per, "--part-rows", "200")
    extract(tiny_release, data, tmp_path / "whole", *options)
    whole, out = manifest(tmp_path / "whole"), tmp_path / "out"
    polls = iter([False] * 6 + [True] * 99)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stopping", property(lambda _: next(polls)))
        with pytest.raises(SystemExit) as stop:
            cli.main(command(tiny_release, data, out, *options))
    assert stop.value.code == EXIT_INTERRUPTED
    assert manifest(out)["state"] == "interrupted"
    (aside,) = (out / "partial").glob("*")
    saved = {name.split("/")[0] for name in open_tensors(aside).names}
    assert len(saved) == 5  # the first poll is for the part, each later one for a batch
    extract(tiny_release, data, out, *options)
    assert not list((out / "partial").glob("*"))
    assert results(out) == results(tmp_path / "whole")
    assert manifest(out)["counts"] == whole["counts"]
    check_exactly_once(out, rows, bad)


def test_batches_put_aside_by_another_run_are_refused(tiny_release, tmp_path, capsys):
    data = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts(5)])
    write_tensors(tmp_path / "out/partial/part-00000.safetensors", {"0/masked": np.zeros(2)}, {"fingerprint": "x"})
    assert cli.main(command(tiny_release, data, tmp_path / "out")) == 2
    assert "part-00000.safetensors belongs to another run" in capsys.readouterr().err


def exactly_once(release, folder, cache, n, part_rows, every):
    """Two shards, each killed twice (SIGTERM, then SIGKILL), against a run that nobody disturbed."""
    rows, bad = damaged_rows(n, every)
    data = write_rows(folder / "a.jsonl", rows)
    options = ("--id-field", "id", "--keep", "n", "--part-rows", str(part_rows), "--batch-tokens", "1024")
    extract(release, data, folder / "whole", *options)
    out = folder / "out"
    for shard in range(2):
        mine = (*options, "--shard", f"{shard}/2")
        for number in (signal.SIGTERM, signal.SIGKILL):
            done = len(list(out.glob("documents/*")))
            process = start(release, data, out, cache, *mine)
            code, told = stop_when(process, number, lambda done=done: len(list(out.glob("documents/*"))) > done)
            assert code == (EXIT_INTERRUPTED if number == signal.SIGTERM else -signal.SIGKILL), told
            assert not (out / "errors.jsonl").exists()
        process = start(release, data, out, cache, *mine)
        _, told = process.communicate(timeout=600)
        assert process.returncode == 0, told
    assert results(out) == results(folder / "whole")
    check_exactly_once(out, rows, bad)
    FeatureStore(out).verify()
    assert manifest(out)["counts"] == manifest(folder / "whole")["counts"]
    return manifest(out)["counts"]


@pytest.mark.slow
def test_two_shards_each_killed_twice_end_with_the_rows_of_an_undisturbed_run(tiny_release, tmp_path, compiled_once):
    counts = exactly_once(tiny_release, tmp_path, compiled_once, n=3000, part_rows=300, every=100)
    assert (counts["documents"], counts["bad"]) == (2970, 30)


@pytest.mark.all
def test_100000_short_documents_with_1_percent_damaged_rows_in_two_shards_each_killed_twice(
    tiny_release, tmp_path, compiled_once
):
    counts = exactly_once(tiny_release, tmp_path, compiled_once, n=100_000, part_rows=16_384, every=100)
    assert (counts["documents"], counts["bad"]) == (99_000, 1000)
    assert counts["wasted_positions"] <= 0.15
