"""Answers that `qscope generate` wrote are diagnosed by the token ids it wrote."""

import json
import shutil

import numpy as np
import pytest

from qscope_jax import cli
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.explorer.tokens import token_bytes
from qscope_jax.features.diagnosis import Complaint, find_suspects, judge_answer
from qscope_jax.sae.formats import load_saes
from tests.jobs.extracting import write_rows

pytestmark = pytest.mark.usefixtures("compiled_once")
PROMPTS = ("the quick brown", "a fox <|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}<|im_start|>assistant\n"


def sources(release, out):
    return ["--model", str(release / "model"), "--sae", str(release / "sae"), "--out", str(out)]


def diagnose(release, data, out, *options):
    return cli.main(["features", "diagnose", "--data", str(data), *options, *sources(release, out)])


@pytest.fixture(scope="module")
def release(tiny_release, tmp_path_factory):
    """With a template for chats."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny_release, folder, dirs_exist_ok=True)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def written(release, compiled_once, tmp_path_factory):
    """Folders of results, of plain prompts and of chats; what a random model writes is no text of any tokenizer."""
    folder = tmp_path_factory.mktemp("written")
    prompts = write_rows(folder / "prompts.jsonl", [{"text": text} for text in PROMPTS])
    for name, options in (("plain", ("--special-tokens",)), ("chat", ("--chat", "--system", "Brief."))):
        command = ["generate", "--prompts", str(prompts), "--max-new-tokens", "12", "--ignore-eos", *options]
        assert cli.main([*command, *sources(release, folder / name)]) == 0
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_the_ids_that_were_written_are_used(release, written, tmp_path, name):
    found = rows(written / name)
    encode = make_encoder(load_tokenizer(release / "model"))
    assert any(encode([row["text"]])[0].tolist() != row["tokens"] for row in found)  # or this test shows nothing
    places = ",".join(str(row["prompt_tokens"] + 3) for row in found)
    assert diagnose(release, written / name / "results.jsonl", tmp_path, "--positions", places) == 0
    made = json.loads((tmp_path / "diagnosis.json").read_text(encoding="utf-8"))
    begins = [answer["answer_begins"] for answer in made["answers"]]
    assert begins == [row["prompt_tokens"] for row in found]
    assert [len(answer["tokens"]) for answer in made["answers"]] == [begin + 12 for begin in begins]
    if name == "plain":
        tokenizer, complaint = load_tokenizer(release / "model"), Complaint("positions", places)
        prompts = make_encoder(tokenizer, special_tokens=True)([row["prompt"] for row in found])
        answers = [np.array(row["tokens"]) for row in found]
        judged = [
            judge_answer(complaint, prompt, own, token_bytes(tokenizer, own.tolist()))
            for prompt, own in zip(prompts, answers, strict=True)
        ]
        backbone, saes = load_backbone(release / "model", dtype="float32"), load_saes(release / "sae")
        expected, _ = find_suspects(backbone, saes, [one for one in judged if one is not None])
        assert made["layers"]["1"] == [vars(suspect) for suspect in expected[1]]


def test_the_token_that_ended_a_text_is_no_part_of_it(release, tmp_path):
    text = "the dog"
    ids = make_encoder(load_tokenizer(release / "model"))([text])[0].tolist()
    row = {"prompt": "", "prompt_tokens": 0, "text": text, "tokens": [*ids, 1], "ended": "eos"}
    data = write_rows(tmp_path / "results.jsonl", [row, {**row, "ended": "length"}])
    assert diagnose(release, data, tmp_path / "out", "--positions", "0") == 0
    answers = json.loads((tmp_path / "out" / "diagnosis.json").read_text(encoding="utf-8"))["answers"]
    assert [len(answer["tokens"]) for answer in answers] == [len(ids), len(ids) + 1]


def test_an_id_without_a_token_is_no_text(release, tmp_path):
    """Vocabularies of models are padded."""
    assert len(load_tokenizer(release / "model")) < 320
    row = {"prompt": "", "prompt_tokens": 0, "text": "a", "tokens": [1, 319, 2], "ended": "length"}
    data = write_rows(tmp_path / "results.jsonl", [row])
    assert diagnose(release, data, tmp_path / "out", "--positions", "1") == 0
    (answer,) = json.loads((tmp_path / "out" / "diagnosis.json").read_text(encoding="utf-8"))["answers"]
    assert answer["tokens"][1] == ""


@pytest.mark.parametrize(
    ("change", "facts", "options", "message"),
    [
        ({}, None, (), "leave generation.json beside the results"),
        ({"tokens": [1, 320]}, {}, (), "token ids below 320"),
        ({"tokens": "x"}, {}, (), "token ids below 320"),
        ({}, {"tokenizer": "another"}, (), "another tokenizer wrote these"),
        ({}, {}, ("--prompt", "x"), "prompts of their own"),
    ],
)
def test_what_cannot_have_been_written_so_is_refused(
    release, written, tmp_path, capsys, change, facts, options, message
):
    said = json.loads((written / "chat" / "generation.json").read_text(encoding="utf-8"))
    if facts is not None:
        (tmp_path / "generation.json").write_text(json.dumps(said | facts), encoding="utf-8")
    data = write_rows(tmp_path / "results.jsonl", [row | change for row in rows(written / "chat")])
    assert diagnose(release, data, tmp_path / "out", "--positions", "0", *options) == 2
    assert message in capsys.readouterr().err
