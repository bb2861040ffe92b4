"""Build the training text: paragraphs of eight languages, cleaned, deduplicated, balanced and split by section.

    python scripts/assets/corpus.py --cache DIR

Writes DIR/corpus.jsonl (rows id, lang, source, section, split, text) and prints bytes per language, source and split.
A section is held out in every language at once, and held-out text repeats no paragraph of the train text.
"""

import argparse
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from readers import READERS
from sources import LANGS, SOURCES, fetch

HELD_OUT = 0.07  # share of the sections
# Largest train bytes per source; other languages are scaled to the same content (BYTES_PER_EN) since scripts differ.
CAP_EN = {"office": 900_000, "install": 500_000, "desktop": 500_000, "image": 500_000, "story": 450_000}
BYTES_PER_EN = {"en": 1.0, "zh": 0.95, "ru": 1.95, "ko": 1.2, "ja": 1.4, "de": 1.12, "fr": 1.15, "es": 1.1}
_SCRIPTS = {
    "zh": re.compile(r"[\u4e00-\u9fff]"),
    "ja": re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]"),
    "ko": re.compile(r"[\uac00-\ud7a3]"),
    "ru": re.compile(r"[\u0400-\u04ff]"),
}
_KANA = re.compile(r"[\u3040-\u30ff]")
_ENGLISH = re.compile(r"\b(?:the|of|and|is|to|you|for|with|this|that|are|it|will|be)\b", re.IGNORECASE)
_END = re.compile(r"[.!?:;…。！？：；」』”»\")）]$")
_CODE = re.compile(r"[{}<>|\\=_\[\]@#$]|https?:|www\.|/\w+/")


def clean(text: str, lang: str) -> str:
    """One paragraph as a single line, or "" when it is no prose of this language."""
    text = unicodedata.normalize("NFC", re.sub(r"\s+", " ", text.replace("\u00ad", "").replace("\u200b", ""))).strip()
    text = re.sub(r" +([.,;:!?])(?=\s|$)", r"\1", text) if lang not in ("fr",) else text
    letters = [char for char in text if char.isalpha()]
    if len(text.encode()) < 45 or not _END.search(text) or len(letters) < 0.6 * len(text):
        return ""
    if len(_CODE.findall(text)) > 1 + len(text) // 150 or "Copyright" in text or "GNU General Public" in text:
        return ""
    if lang in _SCRIPTS:
        share = len(_SCRIPTS[lang].findall(text)) / max(len(letters), 1)
        return text if share > 0.35 and (lang != "ja" or _KANA.search(text)) else ""
    english = len(_ENGLISH.findall(text)) / max(len(text.split()), 1)
    return text if (lang == "en") or english < 0.08 else ""


def held_out(source: str, section: str) -> bool:
    return _unit(f"split/{source}/{section}") < HELD_OUT


def _unit(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _fingerprint(text: str) -> str:
    """Paragraphs that differ in digits, case or punctuation only count as one."""
    return re.sub(r"\W+", "", re.sub(r"\d+", "0", text.lower()))


def sections(tree: Path, lang: str, english: set[str]) -> Iterator[dict]:
    """Deduplicated rows of one language; train sections come first, so repeats vanish from the held-out text."""
    seen = set(english) if lang != "en" else set()
    found = [(s.name, name, texts) for s in SOURCES for name, texts in READERS[s.name](tree, lang)]
    found.sort(key=lambda row: (held_out(row[0], row[1]), row[0], row[1]))
    for source, section, paragraphs in found:
        kept = []
        for text in (clean(paragraph, lang) for paragraph in paragraphs):
            key = _fingerprint(text)
            if text and key not in seen:
                seen.add(key)
                kept.append(text)
        if kept and sum(len(text.encode()) for text in kept) >= 100:
            split = "heldout" if held_out(source, section) else "train"
            name = f"{lang}/{source}/{section}"
            yield {
                "id": name,
                "lang": lang,
                "source": source,
                "section": section,
                "split": split,
                "text": "\n".join(kept),
            }
    if lang == "en":
        english |= seen


def balance(rows: list[dict]) -> list[dict]:
    """Sections in a hashed order, the same in every language, up to the budget of their source and language."""
    found: Counter = Counter()
    for row in rows:
        found[row["lang"], row["source"], row["split"]] += len(row["text"].encode())
    caps = {key: _cap(key, found) for key in found}
    used: Counter = Counter()
    kept = []
    for row in sorted(rows, key=lambda row: _unit(f"order/{row['source']}/{row['section']}")):
        key = (row["lang"], row["source"], row["split"])
        size = len(row["text"].encode())
        if used[key] + size <= caps[key]:
            used[key] += size
            kept.append(row)
    return kept


def _cap(key: tuple[str, str, str], found: Counter) -> float:
    """The budget of a source; what a language lacks elsewhere is shared out over its other manuals."""
    lang, _, split = key
    scale = BYTES_PER_EN[lang] * (HELD_OUT / (1 - HELD_OUT) if split == "heldout" else 1.0)
    budget = {name: CAP_EN[name] * scale for name in CAP_EN}
    manuals = [name for name in budget if name != "story"]  # stories stay near a fifth
    surplus = {name: max(found[lang, name, split] - budget[name], 0.0) for name in manuals}
    lacking = sum(max(budget[name] - found[lang, name, split], 0.0) for name in budget)
    share = min(1.0, lacking / max(sum(surplus.values()), 1.0))
    return budget[key[1]] + share * surplus.get(key[1], 0.0)


def table(rows: list[dict]) -> str:
    sizes: Counter = Counter()
    for row in rows:
        sizes[row["lang"], row["source"], row["split"]] += len(row["text"].encode())
    names = [source.name for source in SOURCES]
    lines = ["KB train/held-out " + " ".join(f"{name:>11}" for name in names) + f"{'all':>12}"]
    for lang in LANGS:
        cells = [(sizes[lang, name, "train"], sizes[lang, name, "heldout"]) for name in names]
        cells.append((sum(cell[0] for cell in cells), sum(cell[1] for cell in cells)))
        lines.append(f"{lang:<18}" + " ".join(f"{a // 1000:>7}/{b // 1000:<3}" for a, b in cells))
    return "\n".join(lines)


def build(cache: Path) -> Path:
    """Fetch, read, clean, balance; returns the path of the corpus."""
    versions = fetch(cache)
    english: set[str] = set()
    rows = [row for lang in LANGS for row in sections(cache / "tree", lang, english)]
    print("found\n" + table(rows))
    rows = balance(rows)
    print("kept\n" + table(rows))
    with (cache / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (cache / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    return cache / "corpus.jsonl"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    build(parser.parse_args().cache)
