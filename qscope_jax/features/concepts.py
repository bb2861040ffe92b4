"""A concept is the name of a set of texts: those that ship with the package, or texts of yours.

The shipped ones are eight languages ("english", "chinese", ...) and three registers ("manual", "story", "everyday"),
64 short texts in all. What a concept is contrasted with by default is the others of its kind, each as a group.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qscope_jax.data.inputs import SHIPPED_TEXTS

LANGUAGES = {
    "english": "en",
    "chinese": "zh",
    "russian": "ru",
    "korean": "ko",
    "japanese": "ja",
    "german": "de",
    "french": "fr",
    "spanish": "es",
}
REGISTERS = ("manual", "story", "everyday")


class TextSets(NamedTuple):
    """Texts that show something, and groups of texts that do not, by name."""

    name: str
    positive: tuple[str, ...]
    negative: dict[str, tuple[str, ...]]


def concept_names() -> tuple[str, ...]:
    """The names of the shipped sets."""
    return (*LANGUAGES, *REGISTERS)


def concept_texts(name: str) -> tuple[str, ...]:
    """The texts of a shipped set; a language's code ("zh") names it too, and case does not matter.

    Raises:
      ValueError: there is no such set; the message says which there are, and how to give texts.
    """
    key = canonical_name(name)
    field, value = ("lang", LANGUAGES[key]) if key in LANGUAGES else ("register", key)
    rows = map(json.loads, SHIPPED_TEXTS.read_text(encoding="utf-8").splitlines())
    return tuple(row["text"] for row in rows if row[field] == value)


def canonical_name(name: str) -> str:
    """The name of a shipped set as `concept_names` lists it.

    Raises:
      ValueError: there is no such set.
    """
    key = name.strip().lower()
    key = next((full for full, code in LANGUAGES.items() if code == key), key)
    if key not in concept_names():
        raise ValueError(
            f"{name!r} is no set of texts that ships along ({', '.join(concept_names())}); for any other concept give "
            "texts that show it and texts that do not: positive=[...], negative=[...] in Python, "
            "--positive FILE --negative FILE for qscope features find"
        )
    return key


def text_sets(
    concept: str | None = None,
    *,
    positive: Sequence[str] | None = None,
    negative: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
) -> TextSets:
    """What to contrast: a shipped concept, or texts.

    Args:
      concept: name of a shipped set, or of whatever `positive` shows.
      positive: texts that show the concept; by default those of the shipped set.
      negative: texts that do not, or groups of such by name; by default the other shipped sets of the concept's kind.

    Raises:
      ValueError: a concept that is no shipped set and lacks texts, neither concept nor texts, or an empty set.
    """
    if isinstance(positive, str) or isinstance(negative, str):
        raise ValueError("positive and negative are sequences of texts, not one string: [text, ...]")
    if concept is None and (positive is None or negative is None):
        raise ValueError("give a concept by name, or positive=[texts that show it] and negative=[texts that do not]")
    if positive is None:
        positive = concept_texts(str(concept))
    if negative is None:
        key = canonical_name(str(concept))
        kind = tuple(LANGUAGES) if key in LANGUAGES else REGISTERS
        negative = {other: concept_texts(other) for other in kind if other != key}
    groups = dict(negative) if isinstance(negative, Mapping) else {"negative": negative}
    if empty := [name for name, texts in {"positive": positive, **groups}.items() if not texts]:
        raise ValueError(f"{', '.join(empty)}: no texts in it")
    if not groups:
        raise ValueError("negative: no groups of texts in it")
    return TextSets(concept or "positive", tuple(positive), {name: tuple(texts) for name, texts in groups.items()})
