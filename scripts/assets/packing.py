"""Corpus rows -> token rows: documents end with the end token and are packed with segment ids.

python scripts/assets/packing.py --cache DIR --split train --out FILE     writes the rows of one split, unpacked
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sources import LANGS
from tokenizers import Tokenizer

EOT = "<|endoftext|>"


class Documents(NamedTuple):
    """Tokenised documents of one split; `tokens[i]` ends with the end token, `sizes[i]` counts its UTF-8 bytes."""

    tokens: list[np.ndarray]
    langs: np.ndarray  # index into LANGS
    sources: list[str]


class Rows(NamedTuple):
    """Packed rows [n, t + 1]: inputs are [:, :-1], targets [:, 1:]; a target in another segment does not count."""

    tokens: np.ndarray
    segments: np.ndarray
    langs: np.ndarray


def load_documents(corpus: Path, tokenizer: Tokenizer, split: str) -> Documents:
    with corpus.open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["split"] == split]
    end = tokenizer.token_to_id(EOT)
    encoded = tokenizer.encode_batch_fast([row["text"] for row in rows])
    tokens = [np.array([*one.ids, end], np.int32) for one in encoded]
    langs = np.array([LANGS.index(row["lang"]) for row in rows], np.int32)
    return Documents(tokens, langs, [row["source"] for row in rows])


def pack(documents: Documents, length: int, seed: int | list[int] | None) -> Rows:
    """All documents in a seeded order (None: as they come) in one stream, cut into rows that share one token."""
    order = np.arange(len(documents.tokens))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    lengths = [len(documents.tokens[i]) for i in order]
    stream = np.concatenate([documents.tokens[i] for i in order])
    segments = np.repeat(np.arange(len(order), dtype=np.int32), lengths)
    langs = np.repeat(documents.langs[order], lengths)
    count = (len(stream) - 1) // length
    index = np.arange(count)[:, None] * length + np.arange(length + 1)
    return Rows(stream[index], segments[index], langs[index])


def batches(documents: Documents, length: int, size: int, seed: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches (tokens, segments) [size, length + 1]; each epoch packs and orders anew."""
    epoch = 0
    while True:
        rows = pack(documents, length, seed=[*seed, epoch])
        order = np.random.default_rng([*seed, epoch, 1]).permutation(len(rows.tokens))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield rows.tokens[chosen], rows.segments[chosen]
        epoch += 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--split", choices=("train", "heldout"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    with open(chosen.cache / "corpus.jsonl", encoding="utf-8") as rows, open(chosen.out, "w", encoding="utf-8") as out:
        out.writelines(row for row in rows if json.loads(row)["split"] == chosen.split)
