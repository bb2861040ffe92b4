"""Tokenizers: text is text, nothing is added, and ids the model has no row for never reach it."""

import json
import shutil

import numpy as np
import pytest

from qscope_jax.data.documents import Parts, read_ahead
from qscope_jax.data.text import open_corpus
from qscope_jax.data.tokenizer import check_vocabulary, load_tokenizer, make_encoder, tokenizer_hash


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


def test_texts_come_back_and_nothing_is_added(tokenizer):
    texts = ["the quick brown fox", "Übung 習慣 привет\n\n  x", " leading"]
    for text, ids in zip(texts, make_encoder(tokenizer)(texts), strict=True):
        assert ids.dtype == np.uint32
        assert tokenizer.decode(ids.tolist()) == text
        assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_in_a_text_are_plain_text_unless_asked(tokenizer):
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (plain,), (read,) = (make_encoder(tokenizer, special_tokens=s)(["a<|im_end|>b"]) for s in (False, True))
    assert special not in plain
    assert tokenizer.decode(plain.tolist()) == "a<|im_end|>b"
    assert read.tolist().count(special) == 1


def test_the_encoder_does_not_change_the_tokenizer(tokenizer):
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.backend_tokenizer.encode_special_tokens
    make_encoder(tokenizer)(["a<|im_end|>b"])
    assert before == (tokenizer.backend_tokenizer.to_str(), tokenizer.backend_tokenizer.encode_special_tokens)


def test_a_model_with_too_few_rows_is_refused(tokenizer):
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(ValueError, match=f"ids up to {len(tokenizer) - 1}, the model has rows for 100"):
        check_vocabulary(tokenizer, 100)


def test_an_id_beyond_the_model_stops_before_the_device(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    corpus = open_corpus([str(tmp_path / "a.txt")])
    parts = Parts(corpus, [(0, 1)], lambda texts: [np.array([3, 50], np.uint32) for _ in texts], vocab_size=50)
    with pytest.raises(ValueError, match=r"a\.txt:1: token 50, but the model has rows for 50 ids"):
        next(read_ahead(parts))


def test_a_text_of_which_no_token_is_left_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    corpus = open_corpus([str(tmp_path / "a.txt")])
    parts = Parts(corpus, [(0, 2)], lambda texts: [np.zeros(int(t == "two"), np.uint32) for t in texts], 9)
    part = next(read_ahead(parts))
    assert [d.id for d in part.documents] == ["a.txt:2"]
    assert part.bad[0].reason == "no tokens are left of the text"


def test_code_beside_a_tokenizer_is_never_run(tiny_tokenizer, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(tiny_tokenizer, folder)
    (folder / "tokenization_hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_hostile.T"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_source_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer; expected tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_the_hash_tells_tokenizers_apart(tokenizer, tiny_tokenizer):
    other = load_tokenizer(tiny_tokenizer)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
    other.add_tokens(["brown fox"])
    assert tokenizer_hash(tokenizer) != tokenizer_hash(other)


def test_parts_read_ahead_arrive_in_order_and_resume_where_they_were(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"text {i}\n" for i in range(50)))
    corpus = open_corpus([str(tmp_path / "a.txt")])
    parts = Parts(corpus, corpus.parts(rows=7, size=1 << 20), make_encoder(tokenizer), 320)
    whole = list(read_ahead(parts, threads=3))
    assert [part.number for part in whole] == list(range(8))
    parts.chosen = [3, 6]
    for part in read_ahead(parts):
        assert part.documents == whole[part.number].documents
        assert all(map(np.array_equal, part.tokens, whole[part.number].tokens))
