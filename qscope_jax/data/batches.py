"""Documents of any length in batches of few shapes.

Lengths are rounded up to a bounded geometric set of buckets; a bucket of length t has batch_tokens // t rows, always.
Rows are sorted by length and cut greedily, so that a batch holds near-equal lengths and little padding. The plan is a
function of the lengths alone: whoever makes it gets the same batches, which is what makes a half-done part resumable.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

_SMALLEST = 8
_FEW = 4  # a plan of at most so many batches may end in a smaller one


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that batches may have.

    `batch_tokens` is the number of positions of a batch, `max_length` the longest row, `per_octave` the number of
    bucket lengths from one power of two to the next; the rows of a batch are a multiple of `multiple`.
    """

    batch_tokens: int
    max_length: int
    per_octave: int = 4
    multiple: int = 1

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1:
            raise ValueError(f"{self}: every number must be at least 1")

    @property
    def lengths(self) -> tuple[int, ...]:
        """All bucket lengths: 8, 10, 12, 14, 16, 20, ... (multiples of 8 from 32), the last at least `max_length`."""
        found, octave = [], _SMALLEST
        while not found or found[-1] < self.max_length:
            unit = min(octave // 4, 8)
            steps = (octave + octave * i / self.per_octave for i in range(self.per_octave))
            found += [-(-int(step) // unit) * unit for step in steps]
            octave *= 2
        lengths = sorted(set(found))
        return tuple(lengths[: int(np.searchsorted(lengths, self.max_length)) + 1])

    def rows(self, length: int) -> int:
        """Rows of a batch of bucket length `length`."""
        return max(1, self.batch_tokens // length // self.multiple) * self.multiple


class Segments(NamedTuple):
    """Pieces of documents, each a row of some batch: tokens[begin:end], of which the first `context` only give context.

    All but `tokens` are int64 [rows]; rows of one document follow each other.
    """

    tokens: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    context: np.ndarray
    document: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.begin


class Batch(NamedTuple):
    """Which segments stand in a batch of shape [size, length]; rows past `len(rows)` are padding."""

    size: int
    length: int
    rows: np.ndarray


def cut_documents(
    documents: Sequence[np.ndarray],
    max_length: int,
    *,
    long: Literal["truncate", "window"] = "truncate",
    overlap: int = 0,
) -> Segments:
    """Cuts documents longer than `max_length` off, or into windows.

    Args:
      documents: token ids [n_tokens] each, none empty.
      max_length: the longest segment.
      long: "truncate" keeps the start; "window" keeps everything, every token counted in one window only.
      overlap: tokens of the window before that a window repeats as context, not counted again.

    Raises:
      ValueError: the overlap leaves nothing new in a window.
    """
    if not 0 <= overlap < max_length:
        raise ValueError(f"overlap = {overlap} must be at least 0 and below the longest row, {max_length}")
    lengths = np.array([len(document) for document in documents], np.int64)
    ends = np.cumsum(lengths)
    stride = max_length - overlap
    more = np.maximum(-(-(lengths - max_length) // stride), 0) if long == "window" else np.zeros_like(lengths)
    document = np.repeat(np.arange(len(lengths)), more + 1)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(more + 1)])[:-1]
    window = np.arange(len(document)) - first[document]
    begin = (ends - lengths)[document] + window * stride
    end = np.minimum(begin + max_length, ends[document])
    tokens = np.concatenate([np.zeros(0, np.uint32), *documents])
    return Segments(tokens, begin, end, np.where(window > 0, overlap, 0), document)


def plan_batches(lengths: np.ndarray, buckets: Buckets) -> list[Batch]:
    """Cuts rows of the given lengths, longest first, into batches of the buckets' shapes.

    Only where the whole plan has at most four batches may the last one have fewer rows than its bucket's (by factors of
    four), so that a handful of texts is not computed in a batch for hundreds.

    Raises:
      ValueError: a row is longer than `max_length` or empty.
    """
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= buckets.max_length:
        raise ValueError(f"rows have {lengths.min()} to {lengths.max()} tokens; expected 1 to {buckets.max_length}")
    choices = np.array(buckets.lengths)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        length = int(choices[np.searchsorted(choices, lengths[order[start]])])
        size = buckets.rows(length)
        batches.append(Batch(size, length, order[start : start + size]))
        start += size
    if batches and len(batches) <= _FEW:
        last = batches[-1]
        size = last.size
        while -(-size // 4) >= len(last.rows) and size > 1:
            size = -(-size // 4)
        batches[-1] = last._replace(size=-(-size // buckets.multiple) * buckets.multiple)
    return batches


def fill_batch(batch: Batch, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """The batch's tokens, int32 [size, length], zero where padded, and its mask, True at real tokens."""
    begin, end = segments.begin[batch.rows], segments.end[batch.rows]
    lengths = np.zeros(batch.size, np.int64)
    lengths[: len(batch.rows)] = end - begin
    mask = np.arange(batch.length) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = segments.tokens[ranges(begin, end)]
    return tokens, mask


def ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The integers of begin[0]..end[0]-1, begin[1]..end[1]-1, and so on, in one array."""
    lengths = end - begin
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(begin - before, lengths)
