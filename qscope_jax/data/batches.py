"""Documents of any length in batches of few shapes.

Lengths are rounded up to a bounded geometric set of buckets; a bucket of length t has batch_tokens // t rows, always.
Segments are sorted by length and cut greedily, so that rows of near-equal length stand together; or short ones share
rows, where that computes less. The plan is a function of the lengths alone: whoever makes it gets the same batches,
which is what makes a half-done part resumable.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

_SMALLEST = 8
_FEW = 4  # a plan of at most so many batches may end in a smaller one
_SHARED = (64, 128, 256, 512)  # lengths that rows of several documents may have
_ATTENTION = 1024  # attending to so many columns costs about as much as the rest of a small model's layer
PLAN = 2  # to be raised whenever lengths get another plan: batches put aside by another rule do not fit


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
    """Pieces of documents: tokens[begin:end], of which the first `context` only give context.

    All but `tokens` are int64 [segments]; those of one document follow each other.
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
    """Which segments stand where in a batch of shape [size, length]; what they leave free is padding.

    The tokens of segments[i] begin at begin[i] of the flat batch, ascending, and stay within a row.
    """

    size: int
    length: int
    segments: np.ndarray
    begin: np.ndarray

    @property
    def sharing(self) -> int:
        """How many of its segments share a row with another."""
        each = np.bincount(self.begin // self.length)
        return int(each[each > 1].sum())


class Filled(NamedTuple):
    """A batch's content, all [size, length]: int32 tokens, zero where padded; a mask, True at real tokens; segment ids.

    Ids ascend along a row, so that each document sees itself alone.
    """

    tokens: np.ndarray
    mask: np.ndarray
    segment_ids: np.ndarray


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
    """Puts segments of the given lengths into batches: one per row, or short ones packed into rows of one length.

    Of these plans it gives the one that costs least: positions, weighed with the attention of longer rows. Only where
    the whole plan has at most four batches may the last one have fewer rows than its bucket's (by factors of four), so
    that a handful of texts is not computed in a batch for hundreds.

    Raises:
      ValueError: a segment is longer than `max_length` or empty.
    """
    if not len(lengths):
        return []
    if not 0 < lengths.min() <= lengths.max() <= buckets.max_length:
        raise ValueError(f"rows have {lengths.min()} to {lengths.max()} tokens; expected 1 to {buckets.max_length}")
    shared = [room for room in _SHARED if room <= buckets.batch_tokens]
    return min((_plan(lengths, buckets, room) for room in (0, *shared)), key=_cost)


def _cost(plan: Sequence[Batch]) -> int:
    return sum(batch.size * batch.length * (_ATTENTION + batch.length) for batch in plan)


def _plan(lengths: np.ndarray, buckets: Buckets, room: int) -> list[Batch]:
    """The plan that packs what is left when no segment above `room` is; 0 packs nothing."""
    choices = np.array(buckets.lengths)
    order = np.argsort(-lengths, kind="stable")
    batches, start = list[Batch](), 0
    while start < len(order) and lengths[order[start]] > room:
        length = int(choices[np.searchsorted(choices, lengths[order[start]])])
        size = buckets.rows(length)
        chosen = order[start : start + size]
        batches.append(Batch(size, length, chosen, np.arange(len(chosen)) * length))
        start += size
    if start < len(order):
        batches += _packed(order[start:], lengths, buckets.rows(room), room)
    if len(batches) <= _FEW:
        last = batches[-1]
        size, used = last.size, last.begin[-1] // last.length + 1
        while -(-size // 4) >= used and size > 1:
            size = -(-size // 4)
        batches[-1] = last._replace(size=-(-size // buckets.multiple) * buckets.multiple)
    return batches


def _packed(order: np.ndarray, lengths: np.ndarray, size: int, room: int) -> list[Batch]:
    """First fit decreasing: `order` names segments by falling length, all at most `room`."""
    begin = pack_rows(lengths[order], room)
    by_place = np.argsort(begin)
    order, begin = order[by_place], begin[by_place]
    cuts = np.searchsorted(begin, np.arange(size * room, begin[-1] + 1, size * room))
    pieces = zip(np.split(order, cuts), np.split(begin, cuts), strict=True)
    return [Batch(size, room, chosen, place - i * size * room) for i, (chosen, place) in enumerate(pieces)]


def pack_rows(lengths: np.ndarray, room: int) -> np.ndarray:
    """Where segments of falling lengths begin if rows are filled one by one, each time with the longest that fits.

    That is first fit decreasing. Rows of equal lengths are made at once: the work grows with the number of different
    lengths, not of segments.
    """
    kinds, counts = np.unique(-lengths, return_counts=True)
    left = dict(zip((-kinds).tolist(), counts.tolist(), strict=True))
    first = dict(zip((-kinds).tolist(), (np.cumsum(counts) - counts).tolist(), strict=True))
    begin, row = np.empty(len(lengths), np.int64), 0
    while left:
        free, pattern = room, list[tuple[int, int]]()
        for length, count in left.items():
            if take := min(free // length, count):
                pattern.append((length, take))
                free -= length * take
        times = min(left[length] // take for length, take in pattern)
        column = 0
        for length, take in pattern:
            columns = column + length * np.arange(take)
            rows = row + np.arange(times)
            begin[first[length] :][: times * take] = (rows[:, None] * room + columns).ravel()
            column += length * take
            first[length] += times * take
            left[length] -= times * take
        left = {length: count for length, count in left.items() if count}
        row += times
    return begin


def fill_batch(batch: Batch, segments: Segments) -> Filled:
    """The batch's content."""
    begin, end = segments.begin[batch.segments], segments.end[batch.segments]
    place = ranges(batch.begin, batch.begin + end - begin)
    tokens, mask, ids = (np.zeros(batch.size * batch.length, kind) for kind in (np.int32, bool, np.int32))
    tokens[place] = segments.tokens[ranges(begin, end)]
    mask[place] = True
    ids[place] = np.repeat(np.arange(len(begin)), end - begin)
    return Filled(*(array.reshape(batch.size, batch.length) for array in (tokens, mask, ids)))


def ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The integers of begin[0]..end[0]-1, begin[1]..end[1]-1, and so on, in one array."""
    lengths = end - begin
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(begin - before, lengths)
