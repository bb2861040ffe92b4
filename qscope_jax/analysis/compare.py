"""The comparison of two texts, as the release's demo makes it, and the strongest features of one text.

rate_f = share of the kept tokens on which f fires; features are ranked by |rate in the first - rate in the second|.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class RateDifference(NamedTuple):
    """A feature and the shares of kept tokens of both texts on which it fires."""

    feature: int
    first: float
    second: float

    @property
    def difference(self) -> float:
        """The first's less the second's."""
        return self.first - self.second


class Strength(NamedTuple):
    """A feature of one text: mean over kept tokens (zeros count), largest value there, share on which it fires."""

    feature: int
    mean: float
    largest: float
    rate: float


def kept_tokens(
    texts: Sequence[np.ndarray], *, skip_first: bool = False, drop_prefix: bool = False, drop_common: bool = False
) -> list[np.ndarray]:
    """For each of one or two texts, given as token ids [n], which tokens count: bool [n].

    Args:
      texts: the token ids.
      skip_first: not the first token.
      drop_prefix: not the tokens with which both texts begin.
      drop_common: no token whose id occurs in both texts.

    Raises:
      ValueError: no token of a text is left; or an option of two texts is given for one.
    """
    kept = [np.ones(len(ids), bool) for ids in texts]
    if (drop_prefix or drop_common) and len(texts) != 2:
        raise ValueError("dropping what two texts share takes two texts")
    if skip_first:
        for mask in kept:
            mask[:1] = False
    if drop_prefix:
        shortest = min(map(len, texts))
        same = texts[0][:shortest] == texts[1][:shortest]
        prefix = shortest if same.all() else int(same.argmin())
        for mask in kept:
            mask[:prefix] = False
    if drop_common:
        shared = np.intersect1d(texts[0], texts[1])
        for mask, ids in zip(kept, texts, strict=True):
            mask &= ~np.isin(ids, shared)
    for i, mask in enumerate(kept):
        if not mask.any():
            raise ValueError(f"no token of text {i + 1} ({len(mask)} tokens) is left to count: drop fewer")
    return kept


def compare_rates(
    codes: Sequence[tuple[np.ndarray, np.ndarray]], kept: Sequence[np.ndarray], top: int
) -> list[RateDifference]:
    """The `top` features whose rates differ most between two texts; the lower number first where they are equal.

    Args:
      codes: values and indices [n, k] of both texts.
      kept: [n] bool of both.
      top: how many.
    """
    width = 1 + max(int(indices.max(initial=0)) for _, indices in codes)
    one, two = (
        np.bincount(indices[mask][values[mask] > 0], minlength=width) / mask.sum()
        for (values, indices), mask in zip(codes, kept, strict=True)
    )
    order = np.argsort(-np.abs(one - two), kind="stable")[:top]
    return [RateDifference(int(f), float(one[f]), float(two[f])) for f in order if one[f] != two[f]]


def strongest(values: np.ndarray, indices: np.ndarray, kept: np.ndarray, top: int) -> list[Strength]:
    """The `top` features of a text, values and indices [n, k], by their mean over the kept tokens."""
    values, indices = values[kept], indices[kept]
    width = 1 + int(indices.max(initial=0))
    total = np.bincount(indices.ravel(), values.ravel(), minlength=width)
    fired = np.bincount(indices[values > 0], minlength=width)
    largest = np.zeros(width)
    np.maximum.at(largest, indices, values)
    order = np.argsort(-total, kind="stable")[:top]
    n = len(values)
    return [
        Strength(int(f), float(total[f] / n), float(largest[f]), float(fired[f] / n)) for f in order if total[f] > 0
    ]


def activations(values: np.ndarray, indices: np.ndarray, feature: int) -> np.ndarray:
    """[n]: one feature's values on every token of a code, values and indices [n, k]."""
    return np.where(np.asarray(indices) == feature, values, 0).sum(axis=-1)
