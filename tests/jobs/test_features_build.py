"""`qscope features build` from end to end: equal to brute force, from text and from a store, however stopped."""

import json
import shutil
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from qscope_jax import cli
from qscope_jax.analysis.contexts import AFTER, BEFORE
from qscope_jax.analysis.statistics import QUANTILE_ERROR
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.extract import extract_documents
from qscope_jax.features.files import load_statistics
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.jobs.run import EXIT_INTERRUPTED, Run
from qscope_jax.sae.formats import load_saes, save_sae
from qscope_jax.sae.quality import sink_threshold
from tests.jobs.extracting import SMALL, damaged_rows, extract, manifest, texts, write_rows

pytestmark = pytest.mark.usefixtures("compiled_once")
ROWS = [*texts(59), "the quick brown fox " * 20, *damaged_rows(16, 4)[0]]
PARTS = ("--part-rows", "20", "--contexts", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Good rows, one of them longer than a row of a batch, and bad ones; the bad ones last."""
    rows = [{"text": row} if isinstance(row, str) and not row.startswith("{") else row for row in ROWS]
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", rows)


def command(release, data, out, *options):
    sources = ["--model", str(release / "model"), "--sae", str(release / "sae"), "--out", str(out)]
    return ["features", "build", str(data), *sources, *SMALL, "--precision", "parity", *PARTS, *options]


@pytest.fixture(scope="module")
def built(tiny_release, compiled_once, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    assert cli.main(command(tiny_release, data, out)) == 0
    return out


@pytest.fixture(scope="module")
def truth(tiny_release, data):
    """Codes and norms of every good row, [(row, tokens, codes, norms)], with thresholds, by the library."""
    rows = [json.loads(line) if line.strip().endswith("}") else {} for line in data.read_text().splitlines()]
    good = [(i, row["text"]) for i, row in enumerate(rows) if isinstance(row.get("text"), str) and row["text"].strip()]
    backbone, saes = load_backbone(tiny_release / "model", dtype="float32"), load_saes(tiny_release / "sae")
    documents = make_encoder(load_tokenizer(tiny_release / "model"))([text for _, text in good])
    codes = extract_documents(backbone, saes, documents, batch_tokens=256, max_length=32, long="window")
    limits = {layer: sink_threshold(np.concatenate([code.norms[layer][:32] for code in codes])) for layer in saes}
    return [(row, code) for (row, _), code in zip(good, codes, strict=True)], limits


def columns(codes, layer, limit, d_sae=64):
    """Dense activations of all tokens that count, [n, f]."""
    found = []
    for _, code in codes:
        values, indices = code.codes[layer]
        dense = np.zeros((len(values), d_sae), np.float32)
        np.put_along_axis(dense, indices, values, axis=1)
        found.append(dense[code.norms[layer] <= limit])
    return np.concatenate(found)


def results(out):
    names = [*out.glob("*.safetensors"), *out.glob("contexts/*"), out / "errors.jsonl", out / "statistics.json"]
    return {path.name: path.read_bytes() for path in names}


def test_the_numbers_are_those_of_brute_force(built, truth):
    codes, limits = truth
    found = load_statistics(built)
    assert sorted(found) == [0, 1]
    for layer, statistics in found.items():
        dense = columns(codes, layer, limits[layer])
        assert (statistics.tokens, statistics.sinks) == (len(dense), sum(len(c.tokens) for _, c in codes) - len(dense))
        assert statistics.sink_threshold == pytest.approx(limits[layer], rel=1e-6)
        np.testing.assert_array_equal(statistics.density, (dense > 0).mean(axis=0).astype(np.float32))
        np.testing.assert_allclose(statistics.max, dense.max(axis=0), rtol=1e-5)
        np.testing.assert_allclose(statistics.mean, dense.sum(0) / np.maximum((dense > 0).sum(0), 1), rtol=1e-5)
        for q in (0.3, 0.99):
            exact = [np.quantile(c[c > 0], q, method="inverted_cdf") if (c > 0).any() else 0 for c in dense.T]
            np.testing.assert_allclose(statistics.quantile(q), exact, rtol=QUANTILE_ERROR + 1e-5)


def test_the_contexts_are_the_best_tokens_of_the_best_documents(built, truth, tiny_release):
    codes, limits = truth
    tokenizer = load_tokenizer(tiny_release / "model")
    for layer in (0, 1):
        rows = pq.read_table(built / "contexts" / f"layer{layer}.parquet").to_pylist()
        for feature in range(64):
            best = []
            for row, code in codes:
                values, indices = code.codes[layer]
                values = np.where(code.norms[layer][:, None] <= limits[layer], values, 0)
                active = np.where(indices == feature, values, 0).sum(axis=1)
                if active.any():
                    best.append((-active.max(), row, int(active.argmax()), code.tokens))
            own = [row for row in rows if row["feature"] == feature]
            assert [row["rank"] for row in own] == list(range(min(3, len(best))))
            for row, (value, number, position, ids) in zip(own, sorted(best, key=lambda b: b[:3]), strict=False):
                assert row["value"] == pytest.approx(-value, rel=1e-5)
                assert (row["number"], row["document"]) == (number, f"texts.jsonl:{number + 1}")
                window = ids[max(0, position - BEFORE) : position + AFTER + 1].tolist()
                assert (row["position"], row["tokens"]) == (position, window)
                assert row["tokens"][row["at"]] == ids[position]
                assert row["text"] == tokenizer.decode(window)


def test_bad_rows_are_listed_and_counted(built):
    bad = [json.loads(line) for line in (built / "errors.jsonl").read_text().splitlines()]
    assert [row["line"] for row in bad] == [64, 68, 72, 76]
    facts = manifest(built)
    assert facts["counts"]["bad"] == 4
    assert facts["counts"]["documents"] == 72
    assert facts["sinks"]["0"]["threshold"] > 0
    assert load_statistics(built)[1].sae in facts["hashes"]["sae"].values()


def test_one_batch_at_a_time_or_all_in_one_part_gives_the_same_counts(built, tiny_release, data, tmp_path):
    assert cli.main(command(tiny_release, data, tmp_path, "--part-rows", "1000", "--batch-tokens", "64")) == 0
    one, other = load_statistics(built), load_statistics(tmp_path)
    for layer in (0, 1):
        np.testing.assert_array_equal(one[layer].density, other[layer].density)
        np.testing.assert_allclose(one[layer].max, other[layer].max, rtol=1e-5)


@pytest.mark.parametrize("after", [1, 4])
def test_a_stopped_run_goes_on_and_ends_the_same(built, tiny_release, data, tmp_path, monkeypatch, after):
    progress, calls = Run.progress, []

    def stopping(self, *, rows, tokens, already=0):
        progress(self, rows=rows, tokens=tokens, already=already)
        if tokens:
            calls.append(tokens)
        if tokens and len(calls) == after:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "progress", stopping)
    with pytest.raises(SystemExit) as stopped:
        cli.main(command(tiny_release, data, tmp_path))
    assert stopped.value.code == EXIT_INTERRUPTED
    assert manifest(tmp_path)["state"] == "interrupted"
    assert not (tmp_path / "statistics.json").exists()
    monkeypatch.setattr(Run, "progress", progress)
    assert 0 < put_aside(tmp_path) < load_statistics(built)[0].tokens
    assert cli.main(command(tiny_release, data, tmp_path)) == 0
    assert results(tmp_path) == results(built)
    assert not (tmp_path / "partial.safetensors").exists()


def put_aside(out):
    """How many tokens were put aside, of finished parts and of the one under way."""
    file = open_tensors(out / "partial.safetensors")
    return int(file.array("0.total.tokens")) + int(file.array("0.tally.tokens"))


def test_a_killed_run_goes_on_from_what_was_last_put_aside(built, tiny_release, data, tmp_path, monkeypatch):
    progress = Run.progress

    def crash(self, *, rows, tokens, already=0):
        progress(self, rows=rows, tokens=tokens, already=already)
        if tokens and (tmp_path / "partial.safetensors").exists():
            raise MemoryError("killed in the middle of a part")

    monkeypatch.setattr(Run, "progress", crash)
    with pytest.raises(MemoryError):
        cli.main(command(tiny_release, data, tmp_path, "--save-every", "0"))
    monkeypatch.setattr(Run, "progress", progress)
    before = put_aside(tmp_path)
    assert 0 < before < load_statistics(built)[0].tokens
    assert cli.main(command(tiny_release, data, tmp_path)) == 0
    assert results(tmp_path) == results(built)


def test_what_another_run_put_aside_is_refused(tiny_release, data, tmp_path, capsys):
    write_tensors(tmp_path / "partial.safetensors", {"a": np.zeros(1)}, {"run": "{}"})
    assert cli.main(command(tiny_release, data, tmp_path)) == 2
    assert "belongs to a run with other input or options" in capsys.readouterr().err


def test_a_store_gives_what_its_text_gives(built, tiny_release, data, tmp_path, capsys):
    options = ("--per", "token", "--mask-sinks", "--precision", "parity", "--long", "window", "--part-rows", "30")
    extract(tiny_release, data, tmp_path / "store", *options)
    out = tmp_path / "out"
    tokenizer = ("--model", str(tiny_release / "model"))
    assert cli.main(["features", "build", "--store", str(tmp_path / "store"), *tokenizer, "--out", str(out),
                     "--contexts", "3"]) == 0  # fmt: skip
    one, other = load_statistics(built), load_statistics(out)
    for layer in (0, 1):
        a, b = one[layer], other[layer]
        assert (a.tokens, a.sinks, a.sink_threshold, a.sae) == (b.tokens, b.sinks, b.sink_threshold, b.sae)
        np.testing.assert_array_equal(a.density, b.density)
        for name in ("max", "mean", "quantiles"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5)
        assert b.median_norm == pytest.approx(a.median_norm, rel=1 / 128)
        texts_of = [pq.read_table(f / "contexts" / f"layer{layer}.parquet").column("text").to_pylist()
                    for f in (built, out)]  # fmt: skip
        assert texts_of[0] == texts_of[1]


def test_a_store_goes_with_its_own_options_and_tokenizer(tiny_release, data, tmp_path, capsys):
    extract(tiny_release, data, tmp_path / "store", "--per", "token", "--mask-sinks")
    build = ["features", "build", "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    assert cli.main([*build, "--layers", "1"]) == 2
    assert "--layers beside --store" in capsys.readouterr().err
    assert cli.main(build) == 2  # the embedded model's
    assert "tokens of another tokenizer than demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--per", "token"), "extract with --mask-sinks"),
        (("--per", "document", "--mask-sinks"), "extract --per token"),
        (("--per", "token", "--mask-sinks", "--top", "2"), "made with top"),
    ],
)
def test_stores_that_are_not_whole_are_refused(tiny_release, data, tmp_path, capsys, options, message):
    extract(tiny_release, data, tmp_path / "store", *options)
    assert cli.main(["features", "build", "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_tokens_takes_whole_documents_from_the_start(tiny_release, data, truth, tmp_path):
    assert cli.main(command(tiny_release, data, tmp_path, "--tokens", "100", "--contexts", "0")) == 0
    lengths = np.cumsum([len(code.tokens) for _, code in truth[0]])
    assert manifest(tmp_path)["counts"]["tokens"] == lengths[np.searchsorted(lengths, 100)]
    assert not (tmp_path / "contexts").exists()


def test_sinks_are_left_out_and_counted(tiny_release, data, truth, tmp_path):
    codes, _ = truth
    saes = load_saes(tiny_release / "sae")
    limits = {layer: float(np.quantile(np.concatenate([c.norms[layer] for _, c in codes]), 0.8)) for layer in saes}
    shutil.copytree(tiny_release / "model", tmp_path / "model")
    for layer, sae in saes.items():
        config = sae.config.__class__(**{**vars(sae.config), "sink_threshold": limits[layer]})
        save_sae(sae._replace(config=config), tmp_path / "sae")
    assert cli.main(command(tmp_path, data, tmp_path / "out")) == 0
    for layer, found in load_statistics(tmp_path / "out").items():
        dense = columns(codes, layer, found.sink_threshold)
        assert found.sink_threshold == pytest.approx(limits[layer], rel=1e-6)
        assert found.sinks > 0.15 * found.tokens
        assert found.tokens == len(dense)
        np.testing.assert_allclose(found.max, dense.max(axis=0), rtol=1e-5)


def test_an_id_beyond_the_vocabulary_is_refused_before_the_device(tiny_release, data, tmp_path, capsys):
    # The tokenizer's largest id is 302; a model of fewer rows cannot know it (D7).
    shutil.copytree(tiny_release / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**settings, "vocab_size": 290}))
    shutil.copytree(tiny_release / "sae", tmp_path / "sae")
    assert cli.main(command(tmp_path, data, tmp_path / "out")) == 2
    assert "290" in capsys.readouterr().err


def test_nothing_to_count_is_said(tiny_release, tmp_path, capsys):
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": ""}, {"text": " "}])
    assert cli.main(command(tiny_release, bad, tmp_path / "out")) == 2
    assert "no document to measure the sink threshold on" in capsys.readouterr().err
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert cli.main(command(tiny_release, empty, tmp_path / "out")) == 2
    assert "every file is empty" in capsys.readouterr().err


def test_another_runs_folder_is_left_alone(built, tiny_release, data, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(built, out)
    assert cli.main(command(tiny_release, data, out, "--contexts", "2")) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert results(out) == results(built)


def test_a_mesh_counts_the_same(built, tiny_release, data, tmp_path):
    assert cli.main(command(tiny_release, data, tmp_path, "--mesh", "2x2")) == 0
    one, other = load_statistics(built), load_statistics(tmp_path)
    for layer in (0, 1):
        assert (one[layer].tokens, one[layer].sinks) == (other[layer].tokens, other[layer].sinks)
        np.testing.assert_array_equal(one[layer].density, other[layer].density)
        for name in ("max", "mean"):
            np.testing.assert_allclose(getattr(one[layer], name), getattr(other[layer], name), rtol=1e-5)
        rows = [pq.read_table(f / "contexts" / f"layer{layer}.parquet").column("tokens") for f in (built, tmp_path)]
        assert rows[0].to_pylist() == rows[1].to_pylist()
