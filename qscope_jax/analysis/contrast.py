"""Which features tell one set of documents from others, and whether chance would do as well.

difference: mean activation over the tokens of the positive documents - the unweighted mean over the other groups of
theirs. With one other group this is the contrast of the report (§3), with several the monolinguality nu (§7).
p = (1 + relabelled documents that score at least as high) / (1 + relabellings): documents are exchanged, never tokens.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import false_discovery_control, rankdata

from qscope_jax.analysis.features import auroc
from qscope_jax.data.batches import ranges

By = Literal["difference", "rate", "auroc"]
_NUMBERS = 1 << 22  # of the largest array at a time


class Pooled(NamedTuple):
    """One layer's activations of n documents, summed up per document and feature, ordered by (feature, document).

    `tokens` [n] that count; of each pair in which the feature fires: `feature`, `document`, the `total` and `largest`
    value and on how many tokens (`fired`), all [m]: 24 bytes a pair.
    """

    tokens: np.ndarray
    feature: np.ndarray
    document: np.ndarray
    total: np.ndarray
    largest: np.ndarray
    fired: np.ndarray


class Contrast(NamedTuple):
    """Of some features, [f] each: `score` by the chosen statistic; its `p`; see the module for `difference`.

    `rate` is the share of positive tokens on which a feature fires, `other_rate` the largest of another group's, which
    is group number `other`.
    """

    score: np.ndarray
    p: np.ndarray
    difference: np.ndarray
    rate: np.ndarray
    other_rate: np.ndarray
    other: np.ndarray


def pool_tokens(values: np.ndarray, indices: np.ndarray, document: np.ndarray, documents: int) -> Pooled:
    """Sums up the codes of some tokens, values and indices [n, k], by the number of their document [n].

    Tokens that are not to count must be left out before.
    """
    row, slot = np.nonzero(values > 0)
    value, once = values[row, slot], np.ones(len(row), np.int32)
    feature, tokens = indices[row, slot].astype(np.int32), np.bincount(document, minlength=documents)
    return _summed(Pooled(tokens, feature, document[row].astype(np.int32), value.astype(np.float64), value, once))


def join_pooled(parts: Sequence[Pooled]) -> Pooled:
    """What several calls of `pool_tokens` saw of the same documents, together."""
    rest = zip(*(part[1:] for part in parts), strict=True)
    return _summed(Pooled(np.sum([part.tokens for part in parts], axis=0), *map(np.concatenate, rest)))


def choose_documents(pooled: Pooled, chosen: np.ndarray) -> Pooled:
    """The documents where `chosen` [n] is True, numbered anew."""
    number = np.cumsum(chosen) - 1
    kept = chosen[pooled.document]
    rest = [array[kept] for array in pooled[1:]]
    rest[1] = number[rest[1]].astype(np.int32)
    return Pooled(pooled.tokens[chosen], *rest)


def contrast(
    pooled: Pooled,
    groups: np.ndarray,
    features: np.ndarray,
    *,
    by: By = "difference",
    permutations: int = 0,
    seed: int = 0,
) -> Contrast:
    """Contrasts documents of group 0 with those of the others.

    Args:
      pooled: of n documents.
      groups: [n] the group of each, 0 for the positive ones.
      features: [f] which features.
      by: what scores: the difference of mean activations, that of firing rates, or the AUROC of documents' maxima.
      permutations: relabellings of the documents for `p`, which is 1 without any.
      seed: of the relabellings; the same ones for all features.

    Raises:
      ValueError: no positive or no other document.
    """
    if not (groups == 0).any() or not (groups > 0).any():
        raise ValueError(f"a contrast needs documents of both kinds, found {np.bincount(groups).tolist()} by group")
    shuffled = np.random.default_rng(seed).permuted(np.tile(groups, (permutations, 1)), axis=1)
    labels = np.concatenate([groups[None], shuffled])
    present = np.unique(groups[groups > 0])
    blocks = []
    for own, (total, count, largest) in _blocks(pooled, features, len(labels)):
        means, rates = (_group_means(groups[None], present, array, pooled.tokens)[:, 0] for array in (total, count))
        scores = _scores(by, labels, present, total, count, largest, pooled.tokens)
        slack = 1e-9 * np.abs(scores[0])  # an equal labelling must not lose by a rounding error
        p = (1 + (scores[1:] >= scores[0] - slack).sum(axis=0)) / (1 + permutations)
        other = rates[1:].argmax(axis=0)
        found = scores[0], p, means[0] - means[1:].mean(axis=0), rates[0], rates[1:].max(axis=0), present[other]
        blocks.append((own, found))
    columns = (
        [np.concatenate([found[i] for _, found in blocks]) for i in range(len(Contrast._fields))] if blocks else []
    )
    return Contrast(*columns) if blocks else Contrast(*(np.zeros(0) for _ in Contrast._fields))


def document_auroc(
    pooled: Pooled, positive: np.ndarray, features: np.ndarray, *, of: Literal["max", "mean"] = "max"
) -> np.ndarray:
    """[f]: AUROC of each feature's maximum (or mean) over a document's tokens as a test for `positive` documents."""
    found = [np.zeros(0)]
    for _, (total, _, largest) in _blocks(pooled, features, 1):
        scores = largest if of == "max" else total / np.maximum(pooled.tokens, 1)[:, None]
        found.append(auroc(scores, positive))
    return np.concatenate(found)


def active_features(pooled: Pooled) -> np.ndarray:
    """The features that fire anywhere in the documents, ascending."""
    return np.unique(pooled.feature)


def false_discovery_rates(p: Sequence[np.ndarray]) -> list[np.ndarray]:
    """q-values by Benjamini and Hochberg, over the p-values of all features of all layers at once."""
    flat = np.concatenate([np.zeros(0), *p])
    q = false_discovery_control(flat) if len(flat) else flat
    return np.split(q, np.cumsum([len(part) for part in p])[:-1])


def labellings(groups: np.ndarray, by: By = "difference") -> int:
    """How many labellings of documents can differ in score: more relabellings than that make no p any lower.

    Exchanging whole groups of equal size, other than group 0, changes no score; "auroc" knows two groups only.
    """
    first, *others = np.unique_counts(groups if by != "auroc" else np.minimum(groups, 1)).counts.tolist()
    ways = math.factorial(len(groups)) // math.prod(map(math.factorial, (first, *others)))
    return ways // math.prod(math.factorial(number) for number in Counter(others).values())


def halves(groups: np.ndarray) -> np.ndarray:
    """[n] 0 or 1: every other document of each group, in order; one half chooses, the other judges.

    Raises:
      ValueError: a group of a single document.
    """
    half = np.zeros(len(groups), np.int64)
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        if len(own) < 2:
            raise ValueError(f"group {group} has {len(own)} document: one half chooses, the other judges, so give two")
        half[own] = np.arange(len(own)) % 2
    return half


def _summed(given: Pooled) -> Pooled:
    order = np.lexsort((given.document, given.feature))
    _, feature, document, total, largest, count = (given.tokens, *(array[order] for array in given[1:]))
    first = np.flatnonzero((np.diff(feature, prepend=-1) != 0) | (np.diff(document, prepend=-1) != 0))
    if not len(first):
        return given
    sums = (np.add.reduceat(total, first), np.maximum.reduceat(largest, first), np.add.reduceat(count, first))
    return Pooled(given.tokens, feature[first], document[first], *sums)


def _blocks(
    pooled: Pooled, features: np.ndarray, rows: int
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Features by the few, with their totals, counts and maxima, dense [n, few]."""
    size = max(1, _NUMBERS // max(rows, len(pooled.tokens)))
    for start in range(0, len(features), size):
        own = features[start : start + size]
        low, high = (np.searchsorted(pooled.feature, own, side=side) for side in ("left", "right"))
        at, column = ranges(low, high), np.repeat(np.arange(len(own)), high - low)
        dense = np.zeros((3, len(pooled.tokens), len(own)))
        dense[:, pooled.document[at], column] = pooled.total[at], pooled.fired[at], pooled.largest[at]
        yield own, (dense[0], dense[1], dense[2])


def _group_means(labels: np.ndarray, present: np.ndarray, sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[groups, labellings, f]: means over tokens, the positive group first."""
    members = ((labels == group).astype(np.float64) for group in (0, *present))
    return np.stack([(each @ sums) / np.maximum(each @ tokens, 1)[:, None] for each in members])


def _scores(by: By, labels, present, total, count, largest, tokens) -> np.ndarray:
    """[labellings, f]."""
    if by == "auroc":
        wins = int((labels[0] == 0).sum())
        ranks = (labels == 0).astype(np.float64) @ rankdata(largest, axis=0)
        return (ranks - wins * (wins + 1) / 2) / (wins * (labels.shape[1] - wins))
    means = _group_means(labels, present, total if by == "difference" else count, tokens)
    return means[0] - means[1:].mean(axis=0)
