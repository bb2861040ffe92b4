"""Scripts, languages and repetition of generated text."""

import pytest

from qscope_jax.analysis.text import distinct_ngrams, has_script, language_shares, script_share


def test_the_share_of_a_script_is_over_letters_alone():
    assert script_share("Debian 12: 系统 (!)", "Han") == 2 / 8
    assert script_share("Debian 12: 系统 (!)", "Latin") == 6 / 8
    assert script_share("系统", "Han") == 1
    assert script_share("12, 34", "Han") == 0
    assert script_share("", "Han") == 0


def test_several_scripts_count_together():
    text = "日本のカ"
    assert script_share(text, "Han") == 0.5
    assert script_share(text, "Hiragana", "Katakana") == 0.5
    assert script_share(text, "Han", "Hiragana", "Katakana") == 1


def test_any_letter_of_a_script_counts_as_code_switching():
    assert has_script("Use the 系 menu", "Han")
    assert not has_script("Use the menu 12", "Han")
    assert has_script("файл", "Cyrillic")


@pytest.mark.parametrize("scripts", [("Klingon",), (), ("Han]",)])
def test_an_unknown_script_is_refused(scripts):
    with pytest.raises(ValueError, match="script"):
        script_share("text", *scripts)


def test_languages_are_told_apart_among_those_given():
    texts = [
        "Der König stand auf der Mauer.",
        "系统安装完成。",
        "システムをインストールする",
        "Система установлена.",
        "... 12",
    ]
    shares = language_shares(texts, ["en", "de", "zh", "ja", "ru"])
    assert shares == {"": 0.2, "en": 0, "de": 0.2, "zh": 0.2, "ja": 0.2, "ru": 0.2}
    assert language_shares(["Use the menu to open a file."], ["en", "ru"]) == {"en": 1, "ru": 0}


def test_an_unknown_language_and_no_text_are_refused():
    with pytest.raises(ValueError, match=r"languages xx: .*expected ISO 639-1 codes"):
        language_shares(["text"], ["xx"])
    with pytest.raises(ValueError, match="at least one text"):
        language_shares([], ["en"])


def test_repetition_lowers_the_share_of_different_trigrams():
    assert distinct_ngrams([1, 2, 3, 4]) == 1
    assert distinct_ngrams([1, 1, 1, 1, 1]) == 1 / 3
    assert distinct_ngrams([1, 2, 1, 2], n=2) == 2 / 3
    with pytest.raises(ValueError, match="2 tokens hold no 3-gram"):
        distinct_ngrams([1, 2])
