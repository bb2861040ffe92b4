"""`qscope generate` from end to end: what it writes, how it goes on, and what it refuses."""

import io
import json
import shutil
import signal

import numpy as np
import pytest

from qscope_jax import cli
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data import chat
from qscope_jax.data.chat import chat_encoder
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.features.files import load_statistics, save_statistics
from qscope_jax.files.source import resolve
from qscope_jax.generation import generate, pad_left
from qscope_jax.jobs import generate as job
from qscope_jax.jobs import generate_inputs
from qscope_jax.jobs.places import bind
from qscope_jax.jobs.run import EXIT_INTERRUPTED, Run
from qscope_jax.sae.formats import load_saes, save_sae
from qscope_jax.steering import Steer, count_applied, save_recipe, steer
from tests.jobs.extracting import launch, manifest, stop_when, texts, write_rows

pytestmark = pytest.mark.usefixtures("compiled_once")
SMALL = ("--max-new-tokens", "8", "--batch", "4")
PROMPT = "the quick brown"


def command(release, *arguments):
    return ["generate", "--model", str(release / "model"), "--sae", str(release / "sae"), *SMALL, *arguments]


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def write(release, out, *arguments):
    assert cli.main(command(release, *arguments, "--out", str(out))) == 0
    return rows(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten prompts, two of which cannot be used."""
    lines = [{"id": f"p{i}", "text": text} for i, text in enumerate(texts(10, seed=3, longest=9))]
    lines[3], lines[6] = {"id": "p3", "text": ""}, {"id": "p6", "text": "the dog sleeps " * 30}
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", lines)


SAMPLED = ("--id-field", "id", "--temperature", "1", "--top-p", "0.9", "--seed", "40", "--top-logprobs", "2")


@pytest.fixture(scope="module")
def whole(tiny_release, compiled_once, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, write(tiny_release, out, "--prompts", str(data), *SAMPLED)


def test_every_prompt_is_continued_as_the_library_does(tiny_release, data, whole):
    backbone, tokenizer = load_backbone(tiny_release / "model", dtype="float32"), load_tokenizer(tiny_release / "model")
    out, found = whole
    assert [row["number"] for row in found] == [0, 1, 2, 4, 5, 7, 8, 9]
    assert [row["id"] for row in found] == [f"p{row['number']}" for row in found]
    assert [row["seed"] for row in found] == [40 + row["number"] for row in found]
    tokens, mask = pad_left(make_encoder(tokenizer)([row["prompt"] for row in found]))
    expected = generate(
        backbone.params, backbone.config, tokens, mask=mask, max_new_tokens=8, temperature=1.0, top_p=0.9,
        seeds=[row["seed"] for row in found], top_logprobs=2,
    )  # fmt: skip
    for row, made in enumerate(found):
        assert made["tokens"] == expected.tokens[row, : expected.lengths[row]].tolist()
        np.testing.assert_allclose(made["logprobs"], expected.logprobs[row, : expected.lengths[row]], atol=1e-5)
        assert np.shape(made["top_tokens"]) == np.shape(made["top_logprobs"]) == (len(made["tokens"]), 2)
        assert made["prompt_tokens"] == mask[row].sum()
        assert made["ended"] == ("eos" if expected.ended[row] else "length")
    errors = [json.loads(line) for line in (out / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(error["id"], error["line"]) for error in errors] == [("p3", 4), ("p6", 7)]
    assert "go beyond the model's context of 64" in errors[1]["reason"]
    assert manifest(out)["counts"] == {"prompts": 8, "left_out": 2}
    assert manifest(out)["state"] == "complete"


class Stops(Run):
    """A run that is told to stop after some looks at `stopping`."""

    looks = 0

    @property
    def stopping(self):
        Stops.looks -= 1
        return Stops.looks < 0


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(tiny_release, data, whole, tmp_path, monkeypatch):
    arguments = command(tiny_release, "--prompts", str(data), *SAMPLED, "--out", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(job, "Run", Stops)
        for looks in (0, 5, 11, 10):  # nine of them while prompts are prepared
            Stops.looks = looks
            with pytest.raises(SystemExit) as stopped:
                cli.main(arguments)
            assert stopped.value.code == EXIT_INTERRUPTED
            assert manifest(tmp_path)["state"] == "interrupted"
            assert looks > 8 or manifest(tmp_path)["reason"] == f"{looks} of 9 prompts were prepared"
    assert 0 < len(rows(tmp_path)) < 8
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"number": 1, "te')  # what a crash leaves
    assert cli.main(arguments) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == (whole[0] / "results.jsonl").read_bytes()
    monkeypatch.setattr(job, "load_backbone", None)  # nothing is left to do
    assert cli.main(arguments) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == (whole[0] / "results.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--seed", "41"), "seed: was 40, is 41"),
        (("--feature", "1:3", "--strength", "2", "--units", "raw"), "steer: was"),
        (("--max-new-tokens", "9"), "max_new_tokens: was 8, is 9"),
        (("--text-field", "id"), "text_field"),
    ],
)
def test_results_of_other_settings_or_recipes_are_never_taken_for_these(
    tiny_release, data, whole, capfd, changed, named
):
    before = (whole[0] / "results.jsonl").read_bytes()
    arguments = command(tiny_release, "--prompts", str(data), *SAMPLED, "--out", str(whole[0]))
    assert cli.main([*arguments, *changed]) == 2
    told = capfd.readouterr().err
    assert "holds the results of another run" in told
    assert named in told
    assert (whole[0] / "results.jsonl").read_bytes() == before


STEERED = ("--feature", "1:3", "--strength", "2", "--units", "raw")


def test_results_and_recipes_of_another_k_are_never_taken_for_these(tiny_release, tmp_path, capfd, monkeypatch):
    saes = load_saes(tiny_release / "sae")
    places = resolve(tiny_release / "model", what="model"), resolve(tiny_release / "sae", what="sae")
    recipe = save_recipe(tmp_path / "recipe.toml", [Steer(1, 3, 2.0)], saes, bind(*places, (1,)))
    write(tiny_release, tmp_path / "out", PROMPT, *STEERED)
    assert manifest(tmp_path / "out")["facts"]["saes"]["1"]["k"] == 4
    monkeypatch.setattr(job, "load_backbone", None)  # refused before
    with pytest.warns(UserWarning, match="using k = 2 as given"):
        code = cli.main(command(tiny_release, PROMPT, *STEERED, "--k", "2", "--out", str(tmp_path / "out")))
    assert (code, "saes.1.k: was 4, is 2" in capfd.readouterr().err) == (2, True)
    assert cli.main(command(tiny_release, PROMPT, "--steer", str(recipe), "--k", "2")) == 2
    assert "it was made with k = 4 of the SAE of layer 1" in capfd.readouterr().err


def test_a_single_prompt_is_printed_as_it_comes(tiny_release, tmp_path, capsys, monkeypatch):
    told = []
    monkeypatch.setattr("builtins.print", lambda *words, **how: told.append((*words, how.get("end", "\n"))))
    (row,) = write(tiny_release, tmp_path, PROMPT, "--ignore-eos")
    pieces = [words for words in told if len(words) == 2]
    assert "".join(word + end for word, end in pieces) == row["text"] + "\n"
    assert len(pieces) > 3


def test_several_prompts_without_a_folder_are_lines_of_json(tiny_release, capfd, monkeypatch):
    assert cli.main(command(tiny_release, PROMPT, "lazy")) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["prompt"] for row in found] == [PROMPT, "lazy"]
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert cli.main(command(tiny_release)) == 0
    assert capfd.readouterr().out == found[0]["text"] + "\n"


def test_recipes_and_features_steer_and_say_to_how_many_tokens(tiny_release, tmp_path):
    saes = load_saes(tiny_release / "sae")
    entries = [Steer(0, 5, 3.0), Steer(1, 7, mode="ablate", positions="generated")]
    bound = bind(resolve(tiny_release / "model", what="model"), resolve(tiny_release / "sae", what="sae"), (0, 1))
    assert bound.k == {0: 4, 1: 4}
    recipe = save_recipe(tmp_path / "recipe.toml", entries, saes, bound)
    options = ("--feature", "1:9", "--strength", "2", "--units", "raw", "--positions", "prompt")
    (row,) = write(tiny_release, tmp_path / "out", PROMPT, "--steer", str(recipe), *options)
    backbone, tokenizer = load_backbone(tiny_release / "model", dtype="float32"), load_tokenizer(tiny_release / "model")
    (ids,) = make_encoder(tokenizer)([PROMPT])
    tap = steer([*entries, Steer(1, 9, 2.0, positions="prompt")], saes)
    expected = generate(backbone.params, backbone.config, ids[None].astype(np.int32), tap=tap, max_new_tokens=8)
    counts = count_applied(expected.taps.prompt, expected.taps.generated)
    n = len(row["tokens"])
    assert row["tokens"] == expected.tokens[0, :n].tolist()
    assert [entry["selected"] for entry in row["steer"]] == counts.selected[0].tolist()
    assert [entry["selected"] for entry in row["steer"]] == [len(ids) + n - 1, n - 1, len(ids)]
    assert [entry["changed"] for entry in row["steer"]] == counts.changed[0].tolist()
    assert row["steer"][1]["hook"] == "model.layers.1"
    (plain,) = write(tiny_release, tmp_path / "plain", PROMPT)
    assert plain["tokens"] != row["tokens"]
    assert "steer" not in plain


def with_template(release, model, template):
    shutil.copytree(release / "model", model)
    (model / "chat_template.jinja").write_text(template)
    return model


def test_a_chat_is_framed_by_the_models_template(tiny_release, tmp_path, capfd):
    assert cli.main(command(tiny_release, PROMPT, "--chat")) == 2
    assert "has no chat template" in capfd.readouterr().err
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"
    model = with_template(tiny_release, tmp_path / "model", template)
    (model / "generation_config.json").write_text('{"eos_token_id": [301, 302]}')
    chat = ("hi <|im_end|>", "--chat", "--system", "Brief.", "--model", str(model))
    (row,) = write(tiny_release, tmp_path / "out", *chat)
    tokenizer = load_tokenizer(model)
    said = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "hi <|im_end|>"}]
    with chat_encoder(tokenizer) as encode:
        assert row["prompt_tokens"] == len(encode(said))
    (asked,) = write(tiny_release, tmp_path / "special", *chat, "--special-tokens")
    assert asked["prompt_tokens"] < row["prompt_tokens"]
    assert manifest(tmp_path / "out")["facts"]["eos"] == [301, 302]
    (model / "generation_config.json").write_text('{"eos_token_id": ["<|im_end|>"]}')
    assert cli.main(command(tiny_release, *chat)) == 2
    assert "generation_config.json: eos_token_id = ['<|im_end|>'] is not an id" in capfd.readouterr().err


def test_a_chat_that_its_template_refuses_ends_no_run(tiny_release, tmp_path, monkeypatch, capfd):
    template = "{{ raise_exception('too rude') if 'damn' in messages[0].content }}{{ messages[0].content }}"
    model, made, make = with_template(tiny_release, tmp_path / "model", template), [], chat.make_encoder
    monkeypatch.setattr(chat, "make_encoder", lambda *a, **k: made.append(k) or make(*a, **k))
    said = ["the fox", "damn", "the \U000f0301 <|im_end|> dog"]
    path = write_rows(tmp_path / "chats.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(said)])
    options = ("--prompts", str(path), "--chat", "--model", str(model))
    found = write(tiny_release, tmp_path / "out", *options)
    assert [row["prompt"] for row in found] == [said[0], said[2]]
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text(encoding="utf-8").splitlines())
    assert (error["line"], "failed: TemplateError: too rude" in error["reason"]) == (2, True)
    assert len(made) == 2  # with and without special tokens, for all chats
    assert cli.main(command(tiny_release, *options, "--on-error", "fail")) == 2
    assert "too rude" in capfd.readouterr().err


def test_preparing_many_prompts_shows_progress(tiny_release, data, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(generate_inputs, "_SILENT", 0.0)
    write(tiny_release, tmp_path, "--prompts", str(data), *SAMPLED)
    assert "generate: preparing: 9 of 9 prompts (100%)" in capfd.readouterr().err


def test_a_single_steered_prompt_says_what_was_applied(tiny_release, tmp_path, capfd):
    recipe = ("--feature", "1:3", "--units", "raw", "--strength", "-1e6")
    (row,) = write(tiny_release, tmp_path, PROMPT, *recipe, "--mode", "add")
    code = cli.main(command(tiny_release, PROMPT, *recipe, "--mode", "min-clamp"))
    told = capfd.readouterr()
    assert code == 0
    prompt, new = row["prompt_tokens"], len(row["tokens"]) - 1
    words = f"1:3 -1e+06 raw at model.layers.1: {{}} of {prompt} prompt and {{}} of"
    assert f"steered: add {words.format(prompt, new)} {new} generated tokens\n" in told.err
    assert f"steered: min-clamp {words.format(0, 0)}" in told.err  # nothing is lifted to below 0
    assert "steered" not in told.out
    assert cli.main(command(tiny_release, PROMPT)) == 0
    assert "steered" not in capfd.readouterr().err


def test_what_says_that_it_is_steered_is_never_written_unsteered(tiny_release, tmp_path, capfd, monkeypatch):
    """The statement T6: a recipe of nothing, of layers without SAEs, or with statistics of other SAEs ends the run."""
    monkeypatch.setattr(job, "load_backbone", None)
    model, sae = (resolve(tiny_release / what, what=what) for what in ("model", "sae"))
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"format": "qscope-recipe-1", "model": {"sha256": bind(model, sae, ()).model}}))
    saes = load_saes(sae)
    elsewhere = save_recipe(tmp_path / "r.toml", [Steer(1, 3, 2.0)], saes, bind(model, sae, (1,)))
    first = tmp_path / "first"
    save_sae(saes[0], first)
    for recipe, place, says in (
        (empty, tiny_release / "sae", "there are no entries under `steer`"),
        (elsewhere, first, "layer 1"),
    ):
        assert cli.main(command(tiny_release, PROMPT, "--steer", str(recipe), "--sae", str(place))) == 2
        told = capfd.readouterr()
        assert (says in told.err, told.out) == (True, "")


def test_statistics_of_other_saes_are_refused(tiny_release, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(job, "load_backbone", None)
    stats = {1: load_statistics("demo")[1]}
    save_statistics(tmp_path, stats)
    steered = ("--feature", "1:3", "--strength", "2", "--statistics", str(tmp_path))
    assert cli.main(command(tiny_release, PROMPT, *steered)) == 2
    assert f"the statistics of layer 1 are of an SAE with sha256 {stats[1].sae}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PROMPT, "--prompts", "x.jsonl"), "both as arguments and as files"),
        ((PROMPT, ""), "prompt 1: the prompt is empty"),
        ((PROMPT * 20,), "go beyond the model's context of 64"),
        ((PROMPT, "--temperature", "-1"), "temperature = -1.0"),
        ((PROMPT, "--top-p", "0"), "top_p = 0.0"),
        ((PROMPT, "--seed", "-1"), "--seed -1"),
        ((PROMPT, "--batch", "0"), "--batch 0"),
        ((PROMPT, "--stop", ""), "an empty string ends every text"),
        ((PROMPT, "--no-thinking"), "give --chat too"),
        ((PROMPT, "--strength", "2"), "--strength belongs to --feature"),
        ((PROMPT, "--feature", "1:64", "--strength", "2", "--units", "raw"), "its SAE has the features 0..63"),
        ((PROMPT, "--feature", "7:1", "--strength", "2", "--units", "raw"), "layer"),
        ((PROMPT, "--feature", "1:3", "--strength", "2"), "no statistics stand beside these SAEs"),
        ((PROMPT, "--feature", "1:3", "--units", "raw"), "needs a strength"),
        (("--prompts", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_what_means_nothing_is_refused_before_weights_are_read(tiny_release, capfd, monkeypatch, arguments, message):
    monkeypatch.setattr(job, "load_backbone", None)
    assert cli.main(command(tiny_release, *arguments)) == 2
    assert message in capfd.readouterr().err


@pytest.mark.slow
def test_a_mesh_writes_the_same(tiny_release, data, whole, tmp_path):
    found = write(tiny_release, tmp_path, "--prompts", str(data), *SAMPLED, "--mesh", "4x2", "--batch", "3")
    assert [row["tokens"] for row in found] == [row["tokens"] for row in whole[1]]
    assert {shape[0] for _, shape in manifest(tmp_path)["programs"]} == {4}  # filled up to what four devices divide


@pytest.mark.slow
def test_a_signal_ends_it_with_what_is_done_saved(tiny_release, data, whole, compiled_once, tmp_path):
    arguments = command(tiny_release, "--prompts", str(data), *SAMPLED, "--out", str(tmp_path))
    start = lambda: launch(arguments, compiled_once)  # noqa: E731
    code, told = stop_when(start(), signal.SIGTERM, lambda: (tmp_path / "generation.json").exists())
    assert code == EXIT_INTERRUPTED, told
    assert manifest(tmp_path)["state"] == "interrupted"
    process = start()
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert (tmp_path / "results.jsonl").read_bytes() == (whole[0] / "results.jsonl").read_bytes()
