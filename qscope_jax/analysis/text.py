"""What script and language a text is written in, and how much it repeats itself.

script share: letters of the script / all letters        distinct-n: different n-grams / all n-grams (Li et al. 2016)
"""

import functools
from collections.abc import Iterable, Sequence

import regex


def script_share(text: str, *scripts: str) -> float:
    """Share of the letters of `text` that belong to any of these Unicode scripts; 0 for a text without letters.

    Marks and digits are no letters; the Japanese vowel sign belongs to no script and counts as a letter of none.

    Raises:
      ValueError: no script, or one that Unicode does not have.
    """
    letters = _LETTER.findall(text)
    pattern = _scripts(scripts)
    return sum(map(bool, map(pattern.match, letters))) / len(letters) if letters else 0.0


def has_script(text: str, *scripts: str) -> bool:
    """Whether any letter of `text` belongs to one of the scripts: how reports count code switching (report, eq. 24).

    Raises:
      ValueError: as `script_share`.
    """
    return bool(_scripts(scripts).search(text))


def language_shares(texts: Iterable[str], languages: Sequence[str]) -> dict[str, float]:
    """Share of the texts in each of the languages (ISO 639-1), the likeliest one each; under "" those without letters.

    Short or broken text is often told wrongly: give the languages that are possible, and read shares over many texts.

    Raises:
      ValueError: no text, or a language that the identifier does not know.
    """
    found = [_language(text, tuple(sorted(languages))) for text in texts]
    if not found:
        raise ValueError("language shares need at least one text")
    return {name: found.count(name) / len(found) for name in ("", *languages) if name or "" in found}


def distinct_ngrams(tokens: Sequence[int], n: int = 3) -> float:
    """Different n-grams over all n-grams of a sequence: 1 where none comes twice, near 0 in a loop.

    Raises:
      ValueError: fewer than n tokens: there is no n-gram.
    """
    if len(tokens) < n:
        raise ValueError(f"{len(tokens)} tokens hold no {n}-gram")
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams)


_LETTER = regex.compile(r"\p{L}")


@functools.cache
def _scripts(names: tuple[str, ...]) -> "regex.Pattern[str]":
    try:
        if not names or not all(name.replace("_", "").isalpha() for name in names):
            raise regex.error("not a name")
        return regex.compile("[" + "".join(rf"\p{{Script={name}}}" for name in names) + "]")
    except regex.error:
        raise ValueError(
            f"scripts {', '.join(map(repr, names)) or 'none'}: expected Unicode's names, such as Han, Hiragana, Latin"
        ) from None


@functools.cache
def _identifier(languages: tuple[str, ...]):
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # reads 4 MB

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    try:
        identifier.set_languages(list(languages))
    except ValueError as error:
        raise ValueError(
            f"languages {', '.join(languages)}: {error}; expected ISO 639-1 codes such as en, zh"
        ) from None
    return identifier


def _language(text: str, languages: tuple[str, ...]) -> str:
    identifier = _identifier(languages)
    return identifier.classify(text)[0] if _LETTER.search(text) else ""
