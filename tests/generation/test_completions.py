"""Texts end where they should, and a file of results loses nothing and holds nothing twice."""

import json

import numpy as np
import pytest

from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.generation import batch, generate, pad_left
from qscope_jax.generation.completions import Prompt, Stopped, complete, plan_rows
from qscope_jax.generation.results_file import append, dump, sort, take_up
from qscope_jax.mesh import to_host
from qscope_jax.taps import Tap

pytestmark = pytest.mark.usefixtures("compiled_once")
TEXTS = ["the quick brown", "fox", "lazy dog, then the"]
OPTIONS = {"max_new_tokens": 24, "temperature": 1.0, "eos": ()}


@pytest.fixture(scope="module")
def model(tiny_release):
    return load_backbone(tiny_release / "model", dtype="float32"), load_tokenizer(tiny_release / "model")


@pytest.fixture(scope="module")
def prompts(model):
    return [Prompt(ids.astype(np.int32), 7 + i) for i, ids in enumerate(make_encoder(model[1])(TEXTS))]


def finish(model, prompts, **options):
    backbone, tokenizer = model
    return complete(backbone.params, backbone.config, tokenizer, prompts, **{"rows": 4} | OPTIONS | options)[0]


@pytest.fixture(scope="module")
def whole(model, prompts):
    return finish(model, prompts)


def test_they_are_what_generate_gives_without_the_rows_that_fill_up(model, prompts, whole):
    backbone, tokenizer = model
    tokens, mask = pad_left([prompt.tokens for prompt in prompts])
    out = generate(backbone.params, backbone.config, tokens, mask=mask, seeds=[7, 8, 9], **OPTIONS)
    assert [made.tokens.tolist() for made in whole] == out.tokens.tolist()
    assert [made.text for made in whole] == tokenizer.batch_decode(out.tokens)
    assert {made.ended for made in whole} == {"length"}


def test_an_eos_is_a_token_but_no_text(model, prompts, whole):
    eos = int(whole[1].tokens[10])
    for made, free in zip(finish(model, prompts, eos=(eos,)), whole, strict=True):
        n = free.tokens.tolist().index(eos) + 1 if eos in free.tokens else 24
        assert made.tokens.tolist() == free.tokens.tolist()[:n]
        assert made.ended == ("eos" if eos in free.tokens else "length")
        assert model[1].decode(made.tokens[: n - (made.ended == "eos")]) == made.text


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_behind_it(model, prompts, whole):
    stop = whole[0].text[9:11]
    for made, free in zip(finish(model, prompts, stop=("no such text", stop)), whole, strict=True):
        at = free.text.find(stop)
        assert made.ended == ("stop" if at >= 0 else "length")
        assert made.text == (free.text[:at] if at >= 0 else free.text)
        assert made.tokens.tolist() == free.tokens.tolist()[: len(made.tokens)]
        assert len(made.logprobs) == len(made.tokens)
        if at >= 0:
            assert stop in model[1].decode(made.tokens)
            assert stop not in model[1].decode(made.tokens[:-1])


def test_what_is_shown_while_writing_is_never_taken_back(model, prompts, whole):
    shown = []
    stop = whole[0].text[14:16]
    (made,) = finish(model, prompts[:1], rows=1, watch=shown.append, stop=(stop,))
    assert len(shown) >= len(made.tokens) - 1
    assert all(made.text.startswith(text) for text in shown)
    assert made.text == whole[0].text.partition(stop)[0]


def test_streaming_brings_the_tokens_alone_from_the_device(model, prompts, whole, monkeypatch):
    brought = []

    def counted(array):
        brought.append(array)
        return to_host(array)

    monkeypatch.setattr(batch, "to_host", counted)
    looks = []
    tap = Tap(lambda x, *_: (x, x[:, :, :1]), per_layer=np.zeros((2, 1), np.float32))

    def look(_):
        looks.append(brought.copy())
        brought.clear()

    (made,) = finish(model, prompts[:1], rows=1, watch=look, tap=tap, top_logprobs=3)
    assert made.tokens.tolist() == whole[0].tokens.tolist()
    for before in looks:
        assert {(array.dtype.name, array.ndim) for array in before} <= {("int32", 1), ("int32", 2), ("bool", 1)}
    assert any(array.dtype == np.float32 for array in brought)  # at the end all of it


def test_it_stops_between_tokens(model, prompts):
    with pytest.raises(Stopped):
        finish(model, prompts, stopping=lambda: True)


def test_batches_hold_prompts_of_like_length():
    plan = plan_rows([5, 95, 7, 16, 90, 3, 17], rows=3)
    assert plan == [[0, 2, 3], [5], [6], [1, 4]]
    assert plan_rows([5, 6, 7], rows=8) == [[0, 1, 2]]


ROWS = [{"number": i, "text": f"row {i}\n\u2028"} for i in range(6)]
BATCHES = [[4, 0], [1, 5], [3, 2]]


def test_a_file_of_results_goes_on_where_it_was_torn(tmp_path):
    path = tmp_path / "results.jsonl"
    assert take_up(path, BATCHES) == set()
    append(path, [ROWS[4], ROWS[0]])
    append(path, [ROWS[3], ROWS[2]])
    whole = path.read_bytes()
    for torn in ("", dump(ROWS[1])[:9], dump(ROWS[1]) + "\n", dump(ROWS[1]) + "\n" + dump(ROWS[5])):
        path.write_bytes(whole + torn.encode())
        assert take_up(path, BATCHES) == {0, 2}
        assert path.read_bytes() == whole
    append(path, [ROWS[1], ROWS[5]])
    sort(path)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == ROWS
    assert take_up(path, BATCHES) == {0, 1, 2}


@pytest.mark.parametrize("line", ["[]", "{}", '{"number": 6}', dump(ROWS[4]), "half"])
def test_rows_that_are_not_of_this_run_are_refused(tmp_path, line):
    path = tmp_path / "results.jsonl"
    append(path, [ROWS[4]])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:2: no row of this run"):
        take_up(path, BATCHES)
