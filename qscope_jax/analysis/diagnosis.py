"""Why an answer went wrong: features that rise on some tokens against others.

Unexpected text: mean activation on the offending tokens - that on the rest of the answer.
Endless repetition (report §8): activation of a repeated phrase's tokens at its last - at its first occurrence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Loop(NamedTuple):
    """A phrase of `period` tokens that the text repeats from token `start` to its end, at least `repeats` times."""

    start: int
    period: int
    repeats: int


class Rise(NamedTuple):
    """Of every feature [f], mean activation and firing rate on the tokens in question and on those compared with."""

    mean: np.ndarray
    rate: np.ndarray
    other_mean: np.ndarray
    other_rate: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """[f]: by how much the mean is higher on the tokens in question."""
        return self.mean - self.other_mean


def tail_loop(ids: np.ndarray, *, least: int = 3) -> Loop | None:
    """The longest loop with which token ids [n] end, whole or cut off within the phrase; None if there is none.

    Of several phrases that explain equally many tokens it is the shortest.

    Args:
      ids: the text.
      least: how often the whole phrase must stand there.
    """
    best, covered = None, 0
    for period in range(1, len(ids) // least + 1):
        same = ids[period:] == ids[:-period]
        run = len(same) if same.all() else int(same[::-1].argmin())
        if run >= (least - 1) * period and run + period > covered:
            covered = run + period
            best = Loop(len(ids) - covered, period, covered // period)
    return best


def loop_ends(loop: Loop, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each token of a loop's phrase stands for the last time and for the first, [period] each.

    `length` is that of the text, at whose end the loop is.
    """
    first = loop.start + np.arange(loop.period)
    return first + (length - 1 - first) // loop.period * loop.period, first


def rise(values: np.ndarray, indices: np.ndarray, rows: np.ndarray, others: np.ndarray, d_sae: int) -> Rise:
    """What every feature of a code, values and indices [n, k], does on the tokens `rows` and on `others`.

    Both name tokens, by number or as bool [n].

    Raises:
      ValueError: no token in one of them.
    """
    found: list[np.ndarray] = []
    for name, chosen in (("in question", rows), ("to compare with", others)):
        own, features = values[chosen], indices[chosen]
        if not len(own):
            raise ValueError(f"there is no token {name}")
        used = own > 0
        found.append(np.bincount(features[used], own[used], minlength=d_sae) / len(own))
        found.append(np.bincount(features[used], minlength=d_sae) / len(own))
    return Rise(*found)


def covering(pieces: Sequence[bytes], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """[n] bool: which of n tokens, given as bytes of text, hold a byte of these spans of bytes."""
    ends = np.cumsum([len(piece) for piece in pieces])
    begins = ends - [len(piece) for piece in pieces]
    found = np.zeros(len(pieces), bool)
    for low, high in spans:
        found |= (begins < high) & (ends > low)
    return found


def character_spans(text: str, chosen: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of characters as spans of bytes of the text in UTF-8; bytes that were no UTF-8 count one each.

    `text` comes from `bytes.decode("utf-8", "surrogateescape")`.
    """
    sizes = [len(c.encode("utf-8", "surrogateescape")) for c in text]
    at = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    return [(int(at[low]), int(at[high])) for low, high in chosen]
