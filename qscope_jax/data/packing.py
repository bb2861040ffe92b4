"""Documents of one virtual shard, laid end to end and cut into full rows.

A shard's documents of one source form an endless run of tokens; its rows are cut from that run, so a document may end
in one row and go on in the next. Where the run stands is (document, tokens used of it): that is the whole state.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

_HOPELESS = 10_000  # unusable documents in a row after which a source counts as unusable


class TokenRun:
    """The endless documents of one source and shard; element i of `documents` is token ids [n], or why there are none.

    `end_token` is put after every document.
    """

    def __init__(self, name: str, documents: "grain.MapDataset[np.ndarray | str]", end_token: int | None = None):
        self._name, self._documents = name, documents
        self._end = np.array([] if end_token is None else [end_token], np.int32)
        self.state = {"document": 0, "offset": 0, "skipped": 0}

    @property
    def state(self) -> dict[str, int]:
        """Documents begun or passed over, tokens used of the one at hand, and how many were passed over."""
        return {"document": self._document, "offset": self._offset, "skipped": self._skipped}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        self._document, self._offset, self._skipped = (state[key] for key in ("document", "offset", "skipped"))
        self._tokens = self._load() if self._offset else None
        if self._tokens is not None and len(self._tokens) <= self._offset:
            raise ValueError(
                f"{self._name}: the document to go on with has {len(self._tokens)} tokens, of which {self._offset} are "
                "said to be used: the data is not what it was when this position was kept"
            )

    def fill(self, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        """Writes the next tokens of the run into a row [t], and 0, 1, ... for its documents into `segment_ids` [t].

        Raises:
          ValueError: no end of documents without a token.
        """
        filled = segment = 0
        while filled < len(tokens):
            if self._tokens is None:
                self._tokens = self._load()
            take = min(len(self._tokens) - self._offset, len(tokens) - filled)
            tokens[filled : filled + take] = self._tokens[self._offset : self._offset + take]
            segment_ids[filled : filled + take] = segment
            filled, segment, self._offset = filled + take, segment + 1, self._offset + take
            if self._offset == len(self._tokens):
                self._document, self._offset, self._tokens = self._document + 1, 0, None

    def _load(self) -> np.ndarray:
        """The tokens of the document at hand, or of the next one that has any."""
        reason = ""
        for _ in range(_HOPELESS):
            found = self._documents[self._document]
            if isinstance(found, np.ndarray):
                return np.concatenate([found, self._end]) if len(self._end) else found
            reason, self._document, self._skipped = str(found), self._document + 1, self._skipped + 1
        raise ValueError(
            f"{self._name}: {_HOPELESS:,} documents in a row gave no token, the last because: {reason}. "
            "Check which field or column is read, and that the data is what you think it is"
        )


class ShardRows:
    """The rows of one virtual shard. `choose` says which of the runs each row, by its number, is cut from."""

    def __init__(self, shard: int, runs: Sequence[TokenRun], choose: Callable[[np.ndarray], np.ndarray]):
        self.shard, self._runs, self._choose, self._row = shard, runs, choose, 0

    def fill(self, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        """Writes the next rows into `tokens` and `segment_ids`, both [rows, t]."""
        chosen = self._choose(np.arange(self._row, self._row + len(tokens)))
        for run, row, ids in zip(chosen, tokens, segment_ids, strict=True):
            self._runs[run].fill(row, ids)
        self._row += len(tokens)

    @property
    def state(self) -> dict[str, Any]:
        """JSON-able: the shard, its rows given out, and where each run stands."""
        return {"shard": self.shard, "row": self._row, "runs": [run.state for run in self._runs]}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if state["shard"] != self.shard or len(state["runs"]) != len(self._runs):
            raise ValueError(
                f"a position of shard {state['shard']} with {len(state['runs'])} source(s); expected one of shard "
                f"{self.shard} with {len(self._runs)}: give every shard its own position"
            )
        self._row = state["row"]
        for run, kept in zip(self._runs, copy.deepcopy(state["runs"]), strict=True):
            run.state = kept
