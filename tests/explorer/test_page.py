"""The page: what a person sees is what is there, and no text becomes markup."""

import json
import re

from qscope_jax.explorer.page import write_page
from qscope_jax.explorer.tokens import PART, token_labels, visible

HOSTILE = '{{data}}</script><img src=x onerror="alert(1)">\u202e\u200b'


class Pieces:
    """A tokenizer whose ids are positions in a list of byte-level pieces."""

    def __init__(self, *pieces: str):
        self.pieces = pieces

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]


def page_data(label: str) -> dict:
    row = {"feature": 7, "cells": [[0, 1.5]]}
    context = {"tokens": [label], "values": [1.0]}
    language = {"language": "x", "layer": 0, "feature": 7, "auroc": 1.0, "rate": 0.5, "other_rate": 0.0, "other": "y"}
    return {
        "facts": [["Model", label]],
        "languages": [{**language, "contexts": [context]}],
        "layer": 0,
        "texts": [{"label": label, "tokens": [label], "layers": [{"layer": 0, "rows": [row]}]}],
    }


def test_the_page_holds_its_data_unchanged_and_fetches_nothing(tmp_path):
    data = page_data("plain")
    write_page(tmp_path / "index.html", "Title", data)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    assert json.loads(found[1]) == data
    assert not re.search(r"(src|href)\s*=|https?://|@import|\{\{", page)
    assert page.count("<h1>Title</h1>") == page.count("<title>Title</title>") == 1
    assert "default-src 'none'" in page


def test_text_of_documents_cannot_become_markup(tmp_path):
    write_page(tmp_path / "index.html", HOSTILE, page_data(HOSTILE))
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "innerHTML" not in page


def test_a_character_of_several_tokens_stands_at_the_last_of_them():
    # 中 is e4 b8 ad; the byte-level alphabet writes those bytes as these three characters.
    assert token_labels(Pieces("ä", "¸Ń", "Ġa", "Ċ"), [0, 1, 2, 3]) == [PART, "中", " a", "⏎"]


def test_bytes_that_never_become_a_character_are_shown_and_not_lost():
    labels = token_labels(Pieces("ÿ", "ÿ", "ÿ", "ÿ", "a"), range(5))
    assert labels == [PART, PART, PART, "����", "a"]


def test_what_cannot_be_seen_is_made_visible():
    assert visible("a\r\n\tb\u202e\u200b") == "a␍⏎⇥b‹U+202E›‹U+200B›"
