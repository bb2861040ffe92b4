"""From the sparse codes of tokens to the features of documents, in NumPy, without a Python loop over rows.

A (row, feature, value) becomes one uint64 key: positive float32 bits order like the numbers they stand for, so one
vectorised sort groups equal (row, feature) and leaves the largest value last. Results are rows in CSR form.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from qscope_jax.data.batches import ranges

Pool = Literal["max", "mean", "count", "last"]
_VALUE_BITS = 31


class Rows(NamedTuple):
    """Sparse rows: row r has features[offsets[r]:offsets[r + 1]] with as many values."""

    offsets: np.ndarray
    features: np.ndarray
    values: np.ndarray


def pool_codes(values: np.ndarray, indices: np.ndarray, row: np.ndarray, rows: int, d_sae: int, pool: Pool) -> Rows:
    """Pools codes over the tokens of each row; features ascend within a row.

    Args:
      values: float32 [n, k], of the tokens that count; a slot with value <= 0 is unused.
      indices: integers [n, k].
      row: integers [n], ascending: which row each token belongs to. For "last" the caller gives one token of each row.
      rows: how many there are.
      d_sae: number of latents.
      pool: "max" gives the largest value, "count" the number of tokens, "mean" the sum (float64; the caller divides
        by the tokens of the document, zeros included), "last" the value at the given token.
    """
    feature_bits = _bits(d_sae)
    group, flat = _sorted_groups(row, indices, values, feature_bits, rows)
    is_last = np.concatenate([group[1:] != group[:-1], np.ones(min(len(group), 1), bool)])
    ends = np.flatnonzero(is_last)
    if pool in ("max", "last"):
        pooled = flat[ends]
    elif pool == "count":
        pooled = np.diff(ends, prepend=-1).astype(np.float32)
    else:
        starts = np.concatenate([np.zeros(min(len(ends), 1), np.int64), ends[:-1] + 1])
        pooled = np.add.reduceat(flat.astype(np.float64), starts) if len(ends) else np.zeros(0)
    group = group[ends]
    features = (group & ((1 << feature_bits) - 1)).astype(np.uint32)
    return Rows(_offsets(group >> feature_bits, rows), features, pooled)


def rank_rows(rows: Rows, *, top: int | None = None, min_value: float = 0.0, allowed: np.ndarray | None = None) -> Rows:
    """Orders each row by falling value (ties by feature) and drops what is not wanted.

    Args:
      rows: any rows; values become float32.
      top: keep so many features of each row.
      min_value: keep values of at least this much.
      allowed: bool [d_sae], the features to keep.
    """
    count = len(rows.offsets) - 1
    values = rows.values.astype(np.float32)
    keep = values >= min_value if min_value > 0 else values > 0
    if allowed is not None:
        keep &= allowed[rows.features]
    row = np.repeat(np.arange(count), np.diff(rows.offsets))[keep]
    features, values = rows.features[keep], values[keep]
    row, features, values = _ranked(row, features, values, count)
    offsets = _offsets(row, count)
    if top is not None:
        short = np.arange(len(row)) - offsets[row] < top
        features, values, offsets = features[short], values[short], _offsets(row[short], count)
    return Rows(offsets, features, values)


def merge_rows(rows: Rows, document: np.ndarray, documents: int, pool: Pool) -> Rows:
    """Joins the rows of each document (its windows) into one; features ascend. `document` [rows] owns each row."""
    owner = np.repeat(document, np.diff(rows.offsets)).astype(np.uint64)
    feature_bits = np.uint64(_bits(int(rows.features.max(initial=0)) + 1))
    key = owner << feature_bits | rows.features.astype(np.uint64)
    order = np.argsort(key, kind="stable")
    key, values = key[order], rows.values[order]
    starts = np.flatnonzero(np.concatenate([np.ones(min(len(key), 1), bool), key[1:] != key[:-1]]))
    reduce = np.maximum if pool in ("max", "last") else np.add
    values = reduce.reduceat(values, starts) if len(starts) else values
    key = key[starts]
    features = (key & ((np.uint64(1) << feature_bits) - np.uint64(1))).astype(np.uint32)
    return Rows(_offsets((key >> feature_bits).astype(np.int64), documents), features, values)


def take_rows(rows: Rows, order: np.ndarray) -> Rows:
    """The rows in another order, rows[order]."""
    begin, end = rows.offsets[:-1][order], rows.offsets[1:][order]
    entries = ranges(begin, end)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(end - begin)])
    return Rows(offsets, rows.features[entries], rows.values[entries])


def join_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one after another."""
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.offsets) for part in parts)])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    features = np.concatenate([np.zeros(0, np.uint32), *(part.features for part in parts)])
    kind = parts[0].values.dtype if parts else np.float32
    return Rows(offsets, features, np.concatenate([np.zeros(0, kind), *(part.values for part in parts)]))


def _bits(count: int) -> int:
    return max(1, (count - 1).bit_length())


def _sorted_groups(row, index, values, feature_bits: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(row << feature_bits | feature) and value of every used entry of [n, k], ordered by row, feature, value."""
    used = values > 0
    if _bits(count) + feature_bits + _VALUE_BITS > 64:
        row, index, values = np.broadcast_to(row[:, None], used.shape)[used], index[used], values[used]
        order = np.lexsort((values, index, row))
        return (row.astype(np.int64) << feature_bits | index)[order], values[order]
    key = index.astype(np.uint64)  # built in place: this is the hot spot of pooling, and bound by memory
    key |= (row.astype(np.uint64) << np.uint64(feature_bits))[:, None]
    key <<= np.uint64(_VALUE_BITS)
    key |= values.view(np.uint32)
    key = key.ravel() if used.all() else key[used]
    key.sort()
    flat = key.astype(np.uint32)  # cut off above, where one bit of the feature is left
    flat &= np.uint32((1 << _VALUE_BITS) - 1)
    key >>= np.uint64(_VALUE_BITS)
    return key.view(np.int64), flat.view(np.float32)


def _ranked(row, features, values, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The entries ordered by row, falling value, feature."""
    feature_bits = _bits(int(features.max(initial=0)) + 1)
    if _bits(count) + feature_bits + _VALUE_BITS > 64:
        order = np.lexsort((features, -values, row))
        return row[order], features[order], values[order]
    low = np.uint64((1 << _VALUE_BITS) - 1)
    falling = low - values.view(np.uint32).astype(np.uint64)
    key = row.astype(np.uint64) << np.uint64(_VALUE_BITS) | falling
    key = np.sort(key << np.uint64(feature_bits) | features.astype(np.uint64))
    features = (key & np.uint64((1 << feature_bits) - 1)).astype(np.uint32)
    key >>= np.uint64(feature_bits)
    return (
        (key >> np.uint64(_VALUE_BITS)).astype(np.int64),
        features,
        (low - (key & low)).astype(np.uint32).view(np.float32),
    )


def _offsets(row: np.ndarray, count: int) -> np.ndarray:
    """CSR offsets of entries whose rows ascend."""
    return np.searchsorted(row, np.arange(count + 1)).astype(np.int64)
