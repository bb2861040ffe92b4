"""Rows of tokens for training: the same global batches whatever the number of processes, resumable to the token.

Documents of each source are shuffled anew every epoch, without end or once; the i-th of that order belongs to virtual
shard i mod V, which packs its own documents into its own rows. A global batch is rows / V rows of shard 0, of shard 1,
and so on.
"""

import copy
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import grain
import numpy as np

from qscope_jax.data.batches import Filled
from qscope_jax.data.packing import Orders, Reshuffled, ShardRows, TokenRun
from qscope_jax.data.seeding import Split, make_key, split_documents, uniform
from qscope_jax.data.sources import ChosenDocuments, DocumentSource

State = list[dict[str, Any]]

_FEED = 1  # to be raised whenever the same data and settings give other rows
_AHEAD = 2  # batches prepared while the device works


class Feed:
    """An endless iterator of `Filled` batches [own rows, t], made by `open_feed`.

    Every position holds a token, but those behind the end of a feed that gives its documents once.
    `fingerprint` is JSON-able and decides what rows come; `documents` are the numbers of documents per source.
    """

    def __init__(self, batches: "_Batches", fingerprint: dict[str, Any], documents: tuple[int, ...]):
        self.fingerprint, self.documents = fingerprint, documents
        self._batches, self._state = batches, batches.state
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed-ahead")
        self._ahead: deque[Future[tuple[Filled, State]]] = deque()

    def __iter__(self) -> Iterator[Filled]:
        return self

    def __next__(self) -> Filled:
        while len(self._ahead) <= _AHEAD:
            self._ahead.append(self._thread.submit(self._batches.make))
        try:
            filled, self._state = self._ahead.popleft().result()
        except BaseException:
            self._rewind()  # asked again, it tries again: no row is lost
            raise
        return filled

    def state(self) -> State:
        """The position after the last batch given out, one JSON-able entry per own shard."""
        return copy.deepcopy(self._state)

    def restore(self, states: State) -> None:
        """Goes on from `state()` of a feed of equal fingerprint, whoever read these shards then.

        `states` holds at least the own shards' entries, in any order.

        Raises:
          ValueError: an own shard has no entry, or the entries are of other sources.
        """
        by_shard = {state["shard"]: state for state in states}
        own = [rows.shard for rows in self._batches.shards]
        if missing := [shard for shard in own if shard not in by_shard]:
            raise ValueError(f"no position of shard(s) {missing}; positions are of {sorted(by_shard)}")
        state = [copy.deepcopy(by_shard[shard]) for shard in own]
        if (found := len(state[0]["runs"])) != len(self.documents):
            raise ValueError(f"a position in {found} source(s); this feed has {len(self.documents)}")
        self._state = state
        self._rewind()

    @property
    def counts(self) -> dict[str, int]:
        """Documents begun, and those skipped because they hold no token, of the own shards up to `state()`.

        In later epochs they count again. Both together are all documents where a feed by all shards has ended.
        """
        runs = [run for state in self._state for run in state["runs"]]
        skipped = sum(run["skipped"] for run in runs)
        begun = sum(run["document"] + (run["offset"] > 0) for run in runs)
        return {"documents": begun - skipped, "skipped": skipped}

    def close(self) -> None:
        """Ends the threads."""
        self._rewind()
        self._thread.shutdown()
        self._batches.pool.shutdown()

    def _rewind(self) -> None:
        """Drops what was prepared after the last batch given out."""
        while self._ahead:
            if not (future := self._ahead.pop()).cancel():
                wait([future])
        self._batches.state = self._state


def open_feed(
    sources: Sequence[DocumentSource],
    *,
    weights: Sequence[float] | None = None,
    row_length: int,
    rows: int,
    shards: int,
    own: Sequence[int] | None = None,
    seed: int,
    split: Split = "train",
    held_out: float = 0.0,
    split_seed: int = 0,
    once: bool = False,
    vocab_size: int,
    end_token: int | None = None,
    threads: int = 4,
) -> Feed:
    """The rows that training reads, in endless global batches of `rows` x `row_length` tokens.

    To evaluate on N tokens, take the first N / (rows * row_length) batches of a held-out feed: a seed's are always the
    same. With `once` no document comes twice: a batch without any token means that there are no more.

    Args:
      sources: the corpora.
      weights: each source's share of the rows, so of the tokens; equal by default. Rows draw their source by number.
      row_length: tokens of a row; longer documents go on in the next row of their shard.
      rows: rows of a global batch, over all processes.
      shards: virtual shards, V; it divides `rows`, and every number of processes the run shall have divides it. A
        batch comes from V places of the order: the more, the better mixed.
      own: the shards read here, in the order in which their rows shall come; all by default.
      seed: decides the order of documents and of sources.
      split: which documents: all but the held-out ones, or those.
      held_out: the share of every source's documents that is held out, at least one where it is above 0.
      split_seed: decides which; apart from `seed`, so that runs of other seeds hold out the same.
      once: every document comes once. Positions behind the last are padding: their `mask` is False, tokens and segment
        ids are 0. A source that has ended leaves its rows to the others.
      vocab_size: ids must be below it.
      end_token: an id put after every document; none by default.
      threads: how many shards are read and tokenised at once.

    Raises:
      ValueError: a number that does not fit, a source with fewer documents than shards, and, while reading, an id
        beyond the vocabulary or a source without usable documents.
    """
    own = range(shards) if own is None else [int(shard) for shard in own]
    shares = _shares(weights, len(sources))
    _check(rows, shards, own, row_length, threads, held_out)
    if end_token is not None and not 0 <= end_token < vocab_size:
        raise ValueError(f"end_token = {end_token}; the model has rows for ids below {vocab_size}")
    chosen = [ChosenDocuments(s, split_documents(len(s), split, held_out, split_seed), vocab_size) for s in sources]
    for documents in chosen:
        documents.check(shards, split, held_out)

    orders = [Orders(make_key(seed, 1, i), len(documents)) for i, documents in enumerate(chosen)]

    def shard_rows(shard: int) -> ShardRows:
        endless = [Reshuffled(grain.MapDataset.source(d), o).repeat() for d, o in zip(chosen, orders, strict=True)]
        lasts = [len(range(shard, len(documents), shards)) if once else None for documents in chosen]
        runs = [
            TokenRun(s.name, d[shard::shards], end_token, last)
            for s, d, last in zip(sources, endless, lasts, strict=True)
        ]
        cuts, key = np.cumsum(shares)[:-1], make_key(seed, 2)
        return ShardRows(shard, runs, lambda row: np.searchsorted(cuts, uniform(key, row * shards + shard), "right"))

    batches = _Batches([shard_rows(shard) for shard in own], rows // shards, row_length, threads)
    fingerprint = {
        "feed": _FEED,
        "sources": [source.fingerprint() for source in sources],
        "weights": shares.tolist(),
        "row_length": row_length,
        "rows": rows,
        "shards": shards,
        "seed": seed,
        "split": split,
        "held_out": held_out,
        "split_seed": split_seed,
        "once": once,
        "end_token": end_token,
    }
    return Feed(batches, json.loads(json.dumps(fingerprint)), tuple(len(documents) for documents in chosen))


class _Batches:
    """Batches in order; each of a pool of threads fills its share of the shards."""

    def __init__(self, shards: list[ShardRows], rows: int, length: int, threads: int):
        self.shards, self._rows, self._length = shards, rows, length
        self._threads = min(threads, len(shards))
        self.pool = ThreadPoolExecutor(self._threads, thread_name_prefix="feed")

    def make(self) -> tuple[Filled, State]:
        """The next batch, and the position after it."""
        shape = (len(self.shards), self._rows, self._length)
        tokens, segment_ids, filled = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape[:2], int)

        def fill(first: int) -> None:
            for i in range(first, len(self.shards), self._threads):
                self.shards[i].fill(tokens[i], segment_ids[i], filled[i])

        filling = [self.pool.submit(fill, first) for first in range(self._threads)]
        wait(filling)  # before any error goes out: none may still be moving
        for future in filling:
            future.result()
        mask = np.arange(self._length) < filled[..., None]
        return Filled(*(array.reshape(-1, self._length) for array in (tokens, mask, segment_ids))), self.state

    @property
    def state(self) -> State:
        return [rows.state for rows in self.shards]

    @state.setter
    def state(self, states: State) -> None:
        for rows, state in zip(self.shards, states, strict=True):
            rows.state = state


def _shares(weights: Sequence[float] | None, sources: int) -> np.ndarray:
    found = np.ones(sources) if weights is None else np.array(weights, np.float64)
    if not sources or found.shape != (sources,) or not (np.isfinite(found) & (found > 0)).all():
        raise ValueError(f"weights = {weights} for {sources} source(s); expected a number above 0 for each")
    return found / found.sum()


def _check(rows: int, shards: int, own: Sequence[int], row_length: int, threads: int, held_out: float) -> None:
    if min(rows, shards, row_length, threads) < 1 or rows % shards:
        raise ValueError(
            f"rows = {rows}, shards = {shards}, row_length = {row_length}, threads = {threads}; expected numbers above "
            "0, with shards dividing rows"
        )
    if not own or len(set(own) & set(range(shards))) < len(own):
        raise ValueError(f"own = {own}; expected shards among 0..{shards - 1}, each once")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out = {held_out}; expected a share from 0 to below 1")
