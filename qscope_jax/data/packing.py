"""Documents of one virtual shard, laid end to end and cut into full rows.

A shard's documents of one source form a run of tokens, endless or one epoch long; its rows are cut from that run, so a
document may end in one row and go on in the next. Where the run stands is (document, tokens used of it): that is the
whole state.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from qscope_jax.data.seeding import hash_numbers, make_key, number_type

_HOPELESS = 10_000  # unusable documents in a row after which a source counts as unusable
_EPOCHS = 2  # orders kept at a time


class TokenRun:
    """The documents of one source and shard; element i of `documents` is token ids [n], or why there are none.

    `end_token` is put after every document. The run ends before document number `last`; without it, never.
    """

    def __init__(
        self,
        name: str,
        documents: "grain.MapDataset[np.ndarray | str]",
        end_token: int | None = None,
        last: int | None = None,
    ):
        self._name, self._documents, self._last = name, documents, last
        self._end = np.array([] if end_token is None else [end_token], np.int32)
        self.state = {"document": 0, "offset": 0, "skipped": 0}

    @property
    def state(self) -> dict[str, int]:
        """Documents begun or passed over, tokens used of the one at hand, and how many were passed over."""
        return {"document": self._document, "offset": self._offset, "skipped": self._skipped}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        self._document, self._offset, self._skipped = (state[key] for key in ("document", "offset", "skipped"))
        self._tokens = None

    def fill(self, tokens: np.ndarray, segment_ids: np.ndarray) -> int:
        """Writes the next tokens of the run into a row [t], and 0, 1, ... for its documents into `segment_ids` [t].

        Returns how many it wrote: less than t only where the run ends, and the rest is left as it was.

        Raises:
          ValueError: no end of documents without a token, or a position within a document that is no longer so long.
        """
        filled = segment = 0
        while filled < len(tokens):
            if self._tokens is None:
                self._tokens = self._load()
            if self._tokens is None:
                break
            take = min(len(self._tokens) - self._offset, len(tokens) - filled)
            tokens[filled : filled + take] = self._tokens[self._offset : self._offset + take]
            segment_ids[filled : filled + take] = segment
            filled, segment, self._offset = filled + take, segment + 1, self._offset + take
            if self._offset == len(self._tokens):
                self._document, self._offset, self._tokens = self._document + 1, 0, None
        return filled

    def _load(self) -> np.ndarray | None:
        """The tokens of the document at hand, or of the next one that has any; None at the end."""
        reason = ""
        for _ in range(_HOPELESS):
            if self._document == self._last:
                return None
            found = self._documents[self._document]
            if isinstance(found, np.ndarray) and len(found) + len(self._end) > self._offset:
                return np.concatenate([found, self._end]) if len(self._end) else found
            if self._offset:
                raise ValueError(
                    f"{self._name}: the document to go on with does not have the {self._offset} tokens already used of "
                    "it: the data is not what it was when this position was kept"
                )
            reason, self._document, self._skipped = str(found), self._document + 1, self._skipped + 1
        raise ValueError(
            f"{self._name}: {_HOPELESS:,} documents in a row gave no token, the last because: {reason}. "
            "Check which field or column is read, and that the data is what you think it is"
        )


class Reshuffled(grain.MapDataset):
    """The elements of `parent` in an order that every epoch has anew, for `repeat`.

    grain's own `shuffle` walks cycles of 2**16 places: with 64 documents it takes 0.6 ms for each.
    """

    def __init__(self, parent: grain.MapDataset, orders: "Orders"):
        super().__init__(parent)
        self._elements, self._orders = parent, orders

    def __len__(self) -> int:
        return len(self._elements)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._elements[int(self._orders.of(epoch)[place])]


class Orders:
    """Seeded orders of `count` elements, one for each epoch; shared by all shards, which may be an epoch apart."""

    def __init__(self, key: int, count: int):
        self._key, self._numbers = key, np.arange(count, dtype=number_type(count))
        self._lock, self._kept = threading.Lock(), OrderedDict[int, np.ndarray]()

    def of(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._kept:
                hashes = hash_numbers(make_key(self._key, epoch), self._numbers)
                self._kept[epoch] = np.argsort(hashes).astype(self._numbers.dtype)  # no two hashes are equal
            self._kept.move_to_end(epoch)
            while len(self._kept) > _EPOCHS:
                self._kept.popitem(last=False)
            return self._kept[epoch]


class ShardRows:
    """The rows of one virtual shard. `choose` says which of the runs each row, by its number, is cut from.

    Where that run has ended, the next one gives the row: a row is empty only behind the end of all.
    """

    def __init__(self, shard: int, runs: Sequence[TokenRun], choose: Callable[[np.ndarray], np.ndarray]):
        self.shard, self._runs, self._choose, self._row = shard, runs, choose, 0

    def fill(self, tokens: np.ndarray, segment_ids: np.ndarray, filled: np.ndarray) -> None:
        """Writes the next rows into `tokens` and `segment_ids`, both [rows, t], and their lengths into `filled`."""
        chosen = self._choose(np.arange(self._row, self._row + len(tokens)))
        for i, run in enumerate(chosen):
            filled[i] = next(filter(None, (r.fill(tokens[i], segment_ids[i]) for r in self._from(run))), 0)
        self._row += len(tokens)

    def _from(self, run: int) -> Sequence[TokenRun]:
        return (*self._runs[run:], *self._runs[:run])

    @property
    def state(self) -> dict[str, Any]:
        """JSON-able: the shard, its rows given out, and where each run stands."""
        return {"shard": self.shard, "row": self._row, "runs": [run.state for run in self._runs]}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._row = state["row"]
        for run, kept in zip(self._runs, state["runs"], strict=True):
            run.state = kept
