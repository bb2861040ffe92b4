"""The places where each feature is strongest: of the n documents with its largest values, the best token of each.

Exact over any number of batches in any order: documents are ranked by (value, then the earlier document), tokens of a
document by (value, then the earlier position). A feature takes n x (16 + 4 x window) bytes.
"""

from typing import NamedTuple

import numpy as np

BEFORE, AFTER = 16, 7  # tokens kept around the best one


class TopContexts(NamedTuple):
    """The n best documents of every feature, best first; `value` 0 and `document` -1 where there are fewer.

    `value` float32, `document` int64 and `position` int32 (of the token in its document) are [f, n], `window` int32
    [f, n, 24] the token ids from 16 before to 7 behind it, -1 beyond the document's ends.
    """

    value: np.ndarray
    document: np.ndarray
    position: np.ndarray
    window: np.ndarray


class Tokens(NamedTuple):
    """Where the n tokens of a batch come from: `document` [n] and `position` [n] in it, and the token ids around them.

    Token i is `ids[place[i]]`; its document is `ids[begin[i]:end[i]]`.
    """

    document: np.ndarray
    position: np.ndarray
    ids: np.ndarray
    place: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def init_contexts(d_sae: int, n: int) -> TopContexts:
    """Nothing seen yet."""
    window = np.full((d_sae, n, BEFORE + 1 + AFTER), -1, np.int32)
    return TopContexts(
        np.zeros((d_sae, n), np.float32), np.full((d_sae, n), -1, np.int64), np.zeros((d_sae, n), np.int32), window
    )


def add_contexts(contexts: TopContexts, values: np.ndarray, indices: np.ndarray, tokens: Tokens) -> None:
    """Takes the codes of n tokens in, values and indices [n, k]; changes `contexts` in place.

    Only values of at least a feature's n-th best are looked at, so that a batch costs little once the lists are full.
    """
    n = contexts.value.shape[1]
    if not n:
        return
    floor = np.maximum(contexts.value[:, -1], np.finfo(np.float32).tiny)
    row, slot = np.nonzero(values >= floor[np.where(values > 0, indices, 0)])
    if not len(row):
        return
    new = _Records(indices[row, slot], values[row, slot], tokens.document[row], tokens.position[row], row)
    features = np.unique(new.feature)
    old_feature, old_slot = (axis.ravel() for axis in np.meshgrid(features, np.arange(n), indexing="ij"))
    at = old_feature * n + old_slot
    held = contexts.value.reshape(-1)[at] > 0
    at = at[held]
    value, document, position = (array.reshape(-1)[at] for array in contexts[:3])
    old = _Records(old_feature[held], value, document, position, -1 - at)
    chosen = _ranked(_best_of_documents(_Records(*(np.concatenate(pair) for pair in zip(old, new, strict=True)))))
    first = np.flatnonzero(np.diff(chosen.feature, prepend=-1))
    rank = np.arange(len(chosen.feature)) - np.repeat(first, np.diff(first, append=len(chosen.feature)))
    chosen, rank = _Records(*(array[rank < n] for array in chosen)), rank[rank < n]
    window = _windows(contexts, chosen.source, tokens)
    contexts.value[features], contexts.document[features] = 0, -1
    contexts.value[chosen.feature, rank] = chosen.value
    contexts.document[chosen.feature, rank] = chosen.document
    contexts.position[chosen.feature, rank] = chosen.position
    contexts.window[chosen.feature, rank] = window


class _Records(NamedTuple):
    """Candidates, [m] each; `source` is a row of the batch, or -1 - place for one that is held already."""

    feature: np.ndarray
    value: np.ndarray
    document: np.ndarray
    position: np.ndarray
    source: np.ndarray


def _best_of_documents(records: _Records) -> _Records:
    order = np.lexsort((records.position, -records.value, records.document, records.feature))
    feature, document = records.feature[order], records.document[order]
    first = np.ones(len(order), bool)
    first[1:] = (feature[1:] != feature[:-1]) | (document[1:] != document[:-1])
    return _Records(*(array[order[first]] for array in records))


def _ranked(records: _Records) -> _Records:
    order = np.lexsort((records.document, -records.value, records.feature))
    return _Records(*(array[order] for array in records))


def _windows(contexts: TopContexts, source: np.ndarray, tokens: Tokens) -> np.ndarray:
    """The windows of chosen candidates [m, 24]: those held already, and those of the batch."""
    found = np.empty((len(source), BEFORE + 1 + AFTER), np.int32)
    held = source < 0
    found[held] = contexts.window.reshape(-1, found.shape[1])[-1 - source[held]]
    rows = source[~held]
    place = tokens.place[rows, None] + np.arange(-BEFORE, AFTER + 1)
    inside = (place >= tokens.begin[rows, None]) & (place < tokens.end[rows, None])
    found[~held] = np.where(inside, tokens.ids[np.where(inside, place, 0)].astype(np.int64), -1)
    return found
