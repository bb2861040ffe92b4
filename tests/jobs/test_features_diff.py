"""`qscope features diff` from end to end."""

import json
import re

import numpy as np
import pytest

from qscope_jax import cli
from qscope_jax.analysis.compare import compare_rates
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.extract import extract_documents
from qscope_jax.sae.formats import load_saes
from tests.jobs.extracting import manifest

pytestmark = pytest.mark.usefixtures("compiled_once")
ONE, TWO = "the quick brown fox", "the quick lazy dog 習慣"


def command(release, out, *options):
    return ["features", "diff", *options, "--model", str(release / "model"), "--sae", str(release / "sae"),
            "--out", str(out)]  # fmt: skip


def test_two_texts_are_compared_on_the_tokens_that_count(tiny_release, tmp_path, capsys):
    assert cli.main(command(tiny_release, tmp_path, ONE, TWO, "--drop-prefix", "--top", "3")) == 0
    told = capsys.readouterr().out
    backbone, saes = load_backbone(tiny_release / "model", dtype="float32"), load_saes(tiny_release / "sae")
    ids = make_encoder(load_tokenizer(tiny_release / "model"))([ONE, TWO])
    prefix = int((ids[0][: len(ids[1])] == ids[1][: len(ids[0])]).argmin())
    assert prefix > 0
    kept = [np.arange(len(own)) >= prefix for own in ids]
    codes = extract_documents(backbone, saes, ids, max_length=64)
    written = json.loads((tmp_path / "diff.json").read_text(encoding="utf-8"))
    for layer in (0, 1):
        expected = compare_rates([code.codes[layer] for code in codes], kept, 3)
        assert written["layers"][str(layer)] == [row._asdict() for row in expected]
        assert f"layer {layer}" in told
        assert f"{expected[0].feature:>7} {expected[0].first:>7.1%} {expected[0].second:>7.1%}" in told
    assert [[token["kept"] for token in text] for text in written["texts"]] == [mask.tolist() for mask in kept]
    assert "\x1b" not in told
    assert manifest(tmp_path)["counts"]["kept"] == [int(mask.sum()) for mask in kept]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert len(data["summary"]["rows"]) == sum(map(len, written["layers"].values()))
    assert [len(text["tokens"]) for text in data["texts"]] == [len(own) for own in ids]


def test_one_text_shows_its_strongest_features_per_layer_and_token(tiny_release, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TWO, encoding="utf-8")
    assert cli.main(command(tiny_release, tmp_path, f"@{tmp_path / 'text.txt'}", "--layers", "1", "--skip-first")) == 0
    told = capsys.readouterr().out
    written = json.loads((tmp_path / "diff.json").read_text(encoding="utf-8"))
    assert list(written["layers"]) == ["1"]
    (tokens,) = written["texts"]
    assert not tokens[0]["kept"]
    assert tokens[1]["kept"]
    backbone, saes = load_backbone(tiny_release / "model", dtype="float32"), load_saes(tiny_release / "sae", (1,))
    (code,) = extract_documents(backbone, saes, make_encoder(load_tokenizer(tiny_release / "model"))([TWO]))
    for t, token in enumerate(tokens):
        own = code.codes[1]
        assert [f for f, _ in token["features"]["1"]] == own.indices[t][own.values[t] > 0].tolist()
    assert "strongest feature of each token" in told
    assert "習" in told or "慣" in told


def test_a_mesh_shows_the_same(tiny_release, tmp_path):
    found = []
    for name, mesh in (("one", "1x1"), ("four", "2x2")):
        assert cli.main(command(tiny_release, tmp_path / name, ONE, TWO, "--mesh", mesh)) == 0
        found.append(json.loads((tmp_path / name / "diff.json").read_text(encoding="utf-8"))["layers"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("a", "b", "c"), "3 texts given"),
        ((ONE, ONE, "--drop-prefix"), "no token of text 1"),
        ((ONE, ""), "text 2 has 0 tokens"),
        ((ONE * 30,), "the model's context"),
        ((ONE, "--drop-common"), "takes two texts"),
        (("@nowhere.txt",), "nowhere.txt"),
    ],
)
def test_wrong_input_is_named(tiny_release, tmp_path, capsys, options, message):
    assert cli.main(command(tiny_release, tmp_path, *options)) == 2
    assert message in capsys.readouterr().err
