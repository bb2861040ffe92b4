"""Concepts are names of shipped texts, or texts that are given."""

import pytest

from qscope_jax.features.concepts import LANGUAGES, canonical_name, concept_names, concept_texts, text_sets
from qscope_jax.jobs.demo import LANGUAGES as SHOWN


def test_the_eight_languages_and_three_registers_ship_along():
    sets = {name: concept_texts(name) for name in concept_names()}
    assert {code: name.capitalize() for name, code in LANGUAGES.items()} == SHOWN
    assert all(len(texts) >= 8 for texts in sets.values())
    assert sum(len(sets[name]) for name in LANGUAGES) == sum(len(sets[name]) for name in set(sets) - set(LANGUAGES))
    assert concept_texts("zh") == concept_texts(" Chinese ") == sets["chinese"]
    assert "國" not in "".join(sets["english"])


def test_a_concept_is_contrasted_with_the_others_of_its_kind():
    found = text_sets("chinese")
    assert found.name == "chinese"
    assert list(found.negative) == [name for name in LANGUAGES if name != "chinese"]
    assert set(text_sets("story").negative) == {"manual", "everyday"}


def test_texts_of_ones_own_take_the_place_of_either_side():
    assert text_sets(positive=["a"], negative=["b"]).negative == {"negative": ("b",)}
    found = text_sets("chess", positive=["a"], negative={"go": ["b"], "draughts": ["c"]})
    assert found == ("chess", ("a",), {"go": ("b",), "draughts": ("c",)})
    assert text_sets("chinese", positive=["一"]).positive == ("一",)
    assert text_sets("chinese", negative=["b"]).positive == concept_texts("chinese")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"concept": "sarcasm"}, r"'sarcasm' is no set.*positive=\[...\], negative=\[...\]"),
        ({"concept": "sarcasm", "positive": ["a"]}, "'sarcasm' is no set"),
        ({"positive": ["a"]}, "give a concept by name, or"),
        ({}, "give a concept by name, or"),
        ({"positive": "one text", "negative": ["b"]}, "not one string"),
        ({"positive": ["a"], "negative": []}, "negative: no texts"),
        ({"positive": ["a"], "negative": {}}, "no groups"),
    ],
)
def test_what_is_missing_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        text_sets(**given)


def test_names_are_found_in_any_case():
    assert canonical_name("JA") == "japanese"
