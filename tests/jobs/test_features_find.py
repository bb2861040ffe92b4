"""`qscope features find` from end to end, on texts of one's own and on the shipped sets."""

import json
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from qscope_jax import cli
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.features.discovery import discover
from qscope_jax.jobs.run import EXIT_INTERRUPTED, Run
from qscope_jax.sae.formats import load_saes
from tests.jobs.extracting import manifest, texts, write_rows

pytestmark = pytest.mark.usefixtures("compiled_once")


def command(release, out, *options):
    sources = ["--model", str(release / "model"), "--sae", str(release / "sae"), "--out", str(out)]
    return ["features", "find", *sources, "--batch-tokens", "256", "--precision", "parity", *options]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    fox = ["the quick brown fox", "a fox and a dog", "fox fox fox", "the lazy dog sleeps", "dog and fox", "fox fox fox"]
    write_rows(folder / "fox.jsonl", [{"text": text} for text in fox])
    write_rows(folder / "other.jsonl", [{"text": text} for text in [*texts(8, longest=6), ""]])
    return folder


def test_two_sets_are_contrasted_as_the_library_does_it(tiny_release, files, tmp_path, capsys):
    sets = ("--positive", str(files / "fox.jsonl"), "--negative", str(files / "other.jsonl"), "german")
    assert cli.main(command(tiny_release, tmp_path, *sets, "--top", "4", "--permutations", "99")) == 0
    told = capsys.readouterr()
    backbone, saes = load_backbone(tiny_release / "model", dtype="float32"), load_saes(tiny_release / "sae")
    encoder = make_encoder(load_tokenizer(tiny_release / "model"))
    rows = [json.loads(line)["text"] for line in (files / "fox.jsonl").read_text().splitlines()]
    from qscope_jax.features.concepts import concept_texts

    negative = {str(files / "other.jsonl"): texts(8, longest=6), "german": concept_texts("german")}
    assert rows.pop() == rows[2]
    found = discover(backbone, saes, encoder, rows, negative, top=4, permutations=99, batch_tokens=256)
    written = json.loads((tmp_path / "features.json").read_text())
    contexts = [row.pop("contexts") for row in written["features"]]
    assert written["features"] == [vars(f) for f in found.features]
    names = ["positive"] * 5 + [str(files / "other.jsonl")] * 8 + ["german"] * 8
    for feature, own in zip(found.features, contexts, strict=True):
        best = found.contexts[feature.layer]
        assert [row["value"] for row in own] == best.value[feature.feature][best.value[feature.feature] > 0].tolist()
        assert own[0]["set"] == names[best.document[feature.feature, 0]]
        assert own[0]["at"] < len(own[0]["tokens"])
        assert f"[{own[0]['tokens'][own[0]['at']]}]" in told.out
    assert written["reach"]["smallest_p"] == 0.01
    assert [row["layer"] for row in written["profile"]] == [0, 1]
    table = pq.read_table(tmp_path / "features.parquet").to_pandas()
    assert len(table) == sum(len(features) for features, _, _ in found.table.values())
    best = table.sort_values("score", ascending=False).iloc[0]
    assert (best.layer, best.feature) == (found.features[0].layer, found.features[0].feature)
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert str(found.features[0].feature) in told.out
    assert "half of the documents choose" in told.out
    assert "8 of 9 documents; 1 rows cannot be used" in told.err
    assert "left out: 1 in positive." in told.out
    facts = manifest(tmp_path)
    assert facts["counts"]["duplicates"] == {"positive": 1, str(files / "other.jsonl"): 0, "german": 0}
    assert facts["counts"]["documents"] == {"positive": 5, str(files / "other.jsonl"): 8, "german": 8}
    assert set(facts["sink_thresholds"]) == {"0", "1"}


def test_a_shipped_set_needs_no_files(tiny_release, tmp_path, capsys):
    assert cli.main(command(tiny_release, tmp_path, "ja", "--layers", "1", "--permutations", "10")) == 0
    assert "japanese against english, chinese, russian" in capsys.readouterr().out
    assert np.isfinite([f["score"] for f in json.loads((tmp_path / "features.json").read_text())["features"]]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("sarcasm",), "--positive FILE --negative FILE"),
        (("--positive", "english"), "--positive without --negative"),
        (("--positive", "nowhere.jsonl", "--negative", "german"), "nowhere.jsonl"),
        (("english", "--permutations", "-1"), "expected at least 0"),
        (("english", "--documents", "1"), "expected at least 2"),
        (("english", "--layers", "7"), "7"),
        (("--positive", "english", "--negative", "german", "everyday"), "a text stands in positive and in everyday"),
    ],
)
def test_wrong_input_is_named(tiny_release, tmp_path, capsys, options, message):
    assert cli.main(command(tiny_release, tmp_path, *options)) == 2
    assert message in capsys.readouterr().err


def test_documents_are_taken_evenly(tiny_release, files, tmp_path, capsys):
    sets = ("--positive", str(files / "fox.jsonl"), "--negative", "german", "--documents", "2", "--permutations", "0")
    assert cli.main(command(tiny_release, tmp_path, *sets)) == 0
    assert manifest(tmp_path)["counts"]["documents"]["positive"] == 2


def test_where_nothing_is_found_it_says_what_could_be(tiny_release, files, tmp_path, capsys):
    """Three relabellings: p is 0.25 at least, q of one feature among many 1."""
    sets = ("--positive", str(files / "fox.jsonl"), "--negative", "german", "--documents", "4", "--permutations", "3")
    assert cli.main(command(tiny_release, tmp_path, *sets)) == 0
    told, written = capsys.readouterr().out, json.loads((tmp_path / "features.json").read_text())
    active = sum(row["active"] for row in written["profile"])
    table = pq.read_table(tmp_path / "features.parquet").to_pandas()
    assert f"No feature has q < 0.05; the smallest is {table.q.min():.3g}" in told
    assert f"No p is below 0.25 with these relabellings, with which one of {active} features alone has q = 1" in told
    assert f"{(table.p == 0.25).sum()} have this p" in told
    assert f"takes --permutations {20 * active}" in told
    assert "These documents have 15 labellings that differ: more documents are needed" in told


def test_the_picture_says_which_documents_were_used(tiny_release, files, tmp_path, monkeypatch):
    from qscope_jax.jobs import features_find

    notes = []
    monkeypatch.setattr(features_find, "draw_profile", lambda *_, note, **__: notes.append(note))
    sets = ("--positive", str(files / "fox.jsonl"), "--negative", "german", "--permutations", "0")
    assert cli.main(command(tiny_release, tmp_path, *sets)) == 0
    assert notes == ["against german  ·  13 documents: 7 choose, 6 judge"]  # 5 and 8, one of 6 given twice


def test_no_decoder_stays_in_memory(tiny_release, files, tmp_path, monkeypatch):
    from qscope_jax.jobs import features_find

    held, discover = [], features_find.discover

    def watched(backbone, saes, *given, **options):
        held.extend(sae.params.w_dec.size for sae in saes.values())
        return discover(backbone, saes, *given, **options)

    monkeypatch.setattr(features_find, "discover", watched)
    sets = ("--positive", str(files / "fox.jsonl"), "--negative", "german", "--permutations", "0")
    assert cli.main(command(tiny_release, tmp_path, *sets)) == 0
    assert held == [0, 0]


def test_a_mesh_finds_the_same(tiny_release, files, tmp_path):
    sets = ("--positive", str(files / "fox.jsonl"), "--negative", "german", "--permutations", "9")
    for name, mesh in (("one", "1x1"), ("four", "2x2")):
        assert cli.main(command(tiny_release, tmp_path / name, *sets, "--mesh", mesh)) == 0
    one, four = (json.loads((tmp_path / name / "features.json").read_text())["features"] for name in ("one", "four"))
    assert [(f["layer"], f["feature"]) for f in one] == [(f["layer"], f["feature"]) for f in four]
    assert [f["score"] for f in one] == pytest.approx([f["score"] for f in four], rel=1e-4)


def test_a_signal_stops_it(tiny_release, tmp_path, monkeypatch):
    progress = Run.progress

    def stopping(self, **amounts):
        progress(self, **amounts)
        if amounts["tokens"] and not self.stopping:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "progress", stopping)
    with pytest.raises(SystemExit) as stopped:
        cli.main(command(tiny_release, tmp_path, "english"))
    assert stopped.value.code == EXIT_INTERRUPTED
    assert manifest(tmp_path)["state"] == "interrupted"
