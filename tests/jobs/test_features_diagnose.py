"""`qscope features diagnose` from end to end, on planted faults."""

import json
import re

import numpy as np
import pytest

from qscope_jax import cli
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.explorer.tokens import token_bytes
from qscope_jax.extract import extract_documents
from qscope_jax.features.diagnosis import Complaint, find_suspects, judge_answer
from qscope_jax.sae.formats import load_saes
from tests.jobs.extracting import manifest, write_rows

pytestmark = pytest.mark.usefixtures("compiled_once")
MIXED = "the quick 習慣 fox 成"
LOOPED = "a dog the fox the fox the fox the fox"


def command(release, out, *options):
    return ["features", "diagnose", *options, "--model", str(release / "model"), "--sae", str(release / "sae"),
            "--out", str(out)]  # fmt: skip


def diagnosed(release, out, *options):
    assert cli.main(command(release, out, *options)) == 0
    return json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def parts(tiny_release):
    backbone, saes = load_backbone(tiny_release / "model", dtype="float32"), load_saes(tiny_release / "sae")
    tokenizer = load_tokenizer(tiny_release / "model")
    return backbone, saes, tokenizer, make_encoder(tokenizer)


def test_a_script_that_should_not_be_there(tiny_release, parts, tmp_path, capsys):
    backbone, saes, tokenizer, encoder = parts
    found = diagnosed(tiny_release, tmp_path, MIXED, "--prompt", "習", "--script", "Han", "--top", "4")
    told = capsys.readouterr().out
    prompt, own = encoder(["習", MIXED])
    pieces = token_bytes(tokenizer, own.tolist())
    han = [any(byte >= 0x80 for byte in piece) for piece in pieces]
    (answer,) = found["answers"]
    assert answer["answer_begins"] == len(prompt) > 0
    assert answer["wrong"] == [len(prompt) + i for i, wrong in enumerate(han) if wrong]
    assert answer["others"] == [len(prompt) + i for i, wrong in enumerate(han) if not wrong]
    (code,) = extract_documents(backbone, saes, [np.concatenate([prompt, own])])
    for layer in (0, 1):
        dense = np.zeros((len(code.tokens), 64))
        np.put_along_axis(dense, code.codes[layer].indices, code.codes[layer].values, axis=1)
        difference = dense[answer["wrong"]].mean(axis=0) - dense[answer["others"]].mean(axis=0)
        rows = found["layers"][str(layer)]
        assert [row["feature"] for row in rows] == np.argsort(-difference)[:4].tolist()
        norm = np.linalg.norm(saes[layer].params.w_dec[rows[0]["feature"]])
        assert rows[0]["score"] == pytest.approx(difference.max() * norm / np.median(code.norms[layer]), rel=1e-4)
        assert rows[0]["mean"] - rows[0]["other_mean"] == pytest.approx(difference.max(), rel=1e-4)
        assert rows[0]["rate"] == pytest.approx((dense[answer["wrong"]] > 0).mean(axis=0)[rows[0]["feature"]])
    scores = [row["score"] for row in found["best"]]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    assert "[慣]" in told
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert len(data["summary"]["rows"]) == 4
    assert manifest(tmp_path)["counts"]["wrong_tokens"] == sum(han)


def test_a_loop_compares_the_phrases_last_with_its_first_occurrence(tiny_release, parts, tmp_path, capsys):
    backbone, saes, _, encoder = parts
    found = diagnosed(tiny_release, tmp_path, LOOPED, "--loop")
    (own,) = encoder([LOOPED])
    (answer,) = found["answers"]
    phrase = encoder([" the fox"])[0]
    loop = answer["loop"]
    assert (loop["period"], loop["repeats"]) == (len(phrase), 4)
    assert sorted(own[answer["wrong"]].tolist()) == sorted(phrase.tolist())
    assert own[answer["wrong"]].tolist() == own[answer["others"]].tolist()
    assert set(answer["wrong"]) == set(range(len(own) - len(phrase), len(own)))
    assert min(answer["others"]) == loop["start"]
    (code,) = extract_documents(backbone, saes, [own])
    values, indices = code.codes[1]
    best = found["layers"]["1"][0]
    active = np.where(indices == best["feature"], values, 0).sum(axis=1)
    assert best["difference"] == pytest.approx(active[answer["wrong"]].mean() - active[answer["others"]].mean())
    assert "4 times" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (("--substring", "quick"), "quick"),
        (("--match", r"f.x"), "fox"),
    ],
)
def test_text_that_should_not_be_there(tiny_release, parts, tmp_path, options, wrong):
    _, _, tokenizer, encoder = parts
    (answer,) = diagnosed(tiny_release, tmp_path, MIXED, *options)["answers"]
    own = encoder([MIXED])[0]
    held = b"".join(token_bytes(tokenizer, own[answer["wrong"]].tolist())).decode()
    assert wrong in held
    assert len(held) <= len(wrong) + 2


def test_positions_count_from_the_prompt(tiny_release, parts, tmp_path):
    (answer,) = diagnosed(tiny_release, tmp_path, MIXED, "--prompt", "the fox", "--positions", "0,7-8")["answers"]
    assert answer["answer_begins"] == len(parts[3](["the fox"])[0]) < 7
    assert answer["wrong"] == [7, 8]


def test_many_answers_are_one_diagnosis(tiny_release, parts, tmp_path, capsys):
    backbone, saes, tokenizer, encoder = parts
    rows = [
        {"q": "the", "a": MIXED},
        {"q": "fox", "a": "the lazy dog"},
        {"q": None, "a": "習慣 dog"},
        {"q": "x", "a": ""},
    ]
    data = write_rows(tmp_path / "answers.jsonl", rows)
    options = ("--data", str(data), "--text-field", "a", "--prompt-field", "q", "--script", "Han")
    found = diagnosed(tiny_release, tmp_path / "out", *options)
    assert len(found["answers"]) == 2
    assert manifest(tmp_path / "out")["counts"]["skipped"] == 1
    assert "1 rows cannot be used" in capsys.readouterr().err
    judged = []
    for prompt, text in (("the", MIXED), ("", "習慣 dog")):
        before, own = encoder([prompt, text])
        judged.append(judge_answer(Complaint("script", "Han"), before, own, token_bytes(tokenizer, own.tolist())))
    expected, _ = find_suspects(backbone, saes, judged)
    assert found["layers"]["0"] == [vars(suspect) for suspect in expected[0]]


def test_a_mesh_finds_the_same(tiny_release, tmp_path):
    one = diagnosed(tiny_release, tmp_path / "one", MIXED, "--script", "Han")
    four = diagnosed(tiny_release, tmp_path / "four", MIXED, "--script", "Han", "--mesh", "2x2")
    assert [(s["layer"], s["feature"]) for s in one["best"]] == [(s["layer"], s["feature"]) for s in four["best"]]
    assert [s["score"] for s in one["best"]] == pytest.approx([s["score"] for s in four["best"]], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((MIXED,), "by one of --script"),
        ((MIXED, "--script", "Han", "--loop"), "found script, loop"),
        (("--script", "Han"), "give one answer, or --data"),
        ((MIXED, "--script", "Cyrillic"), "found in none of the 1 answers"),
        ((MIXED, "--script", "Klingon"), "Klingon"),
        ((MIXED, "--loop"), "repeats a phrase 3 times or more: found in none"),
        ((MIXED, "--match", "("), "is no regular expression"),
        ((MIXED, "--positions", "0-99"), "nothing else in them"),
        ((MIXED, "--positions", "x"), "expected"),
        ((MIXED * 9, "--script", "Han"), "the model's context"),
        (("", "--script", "Han"), "expected an answer"),
        ((MIXED, "--loop", "--repeats", "1"), "at least 2"),
    ],
)
def test_wrong_input_is_named(tiny_release, tmp_path, capsys, options, message):
    assert cli.main(command(tiny_release, tmp_path, *options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_on_the_embedded_model_chinese_in_an_english_answer_leads_to_the_features_of_chinese(tmp_path):
    """The same features that telling Chinese texts from others finds, without seeing any of these."""
    from qscope_jax.features.concepts import text_sets
    from qscope_jax.features.discovery import discover

    answer = "The wolf was waiting, grey and silent. 它没有攻击，而是转过身去。 Then it led her to the village."
    sources = ["--layers", "3", "--top", "3", "--out", str(tmp_path)]
    assert cli.main(["features", "diagnose", answer, "--script", "Han", *sources]) == 0
    best = json.loads((tmp_path / "diagnosis.json").read_text(encoding="utf-8"))["best"]
    backbone, saes = load_backbone("demo", dtype="float32"), load_saes("demo", (3,))
    sets = text_sets("chinese")
    encoder = make_encoder(load_tokenizer("demo"))
    found = discover(backbone, saes, encoder, sets.positive, sets.negative, top=5, permutations=0)
    assert best[0]["feature"] in [f.feature for f in found.features]
