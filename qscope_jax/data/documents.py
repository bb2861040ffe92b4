"""Parts of a corpus, tokenised ahead of the device by grain's threads, in order."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import grain
import numpy as np

from qscope_jax.data.text import BadRow, Corpus, Document

OnError = Literal["skip", "fail"]
Encoder = Callable[[Sequence[str]], list[np.ndarray]]


class Part(NamedTuple):
    """A range of rows, read and tokenised: `tokens[i]` are the ids of `documents[i]`."""

    number: int
    start: int
    stop: int
    documents: list[Document]
    tokens: list[np.ndarray]
    bad: list[BadRow]


class Parts:
    """Random access to the parts of a corpus, a data source for grain. Element i is part number `chosen[i]`."""

    def __init__(
        self,
        corpus: Corpus,
        ranges: Sequence[tuple[int, int]],
        encoder: Encoder,
        vocab_size: int,
        *,
        chosen: Sequence[int] | None = None,
        on_error: OnError = "skip",
    ):
        self.corpus, self.ranges, self.encoder, self.vocab_size = corpus, ranges, encoder, vocab_size
        self.chosen = range(len(ranges)) if chosen is None else chosen
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Part:
        """Reads and tokenises a part.

        Raises:
          ValueError: an id outside the model's vocabulary, or under "fail" the first bad row.
        """
        number = self.chosen[index]
        start, stop = self.ranges[number]
        documents, bad = self.corpus.read(start, stop)
        tokens = self.encoder([document.text for document in documents])
        for document, ids in zip(documents, tokens, strict=True):
            if not len(ids):
                bad.append(self._bad(document, "no tokens are left of the text"))
            elif ids.max() >= self.vocab_size:
                raise ValueError(f"{document.id}: token {ids.max()}, but the model has rows for {self.vocab_size} ids")
        good = [i for i, ids in enumerate(tokens) if len(ids)]
        bad.sort()
        if bad and self.on_error == "fail":
            first = bad[0]
            raise ValueError(f"{first.file}:{first.line}: {first.reason} (--on-error skip leaves such rows out)")
        return Part(number, start, stop, [documents[i] for i in good], [tokens[i] for i in good], bad)

    def _bad(self, document: Document, reason: str) -> BadRow:
        file, line = self.corpus.place(document.number)
        return BadRow(document.number, document.id, file, line, reason)


def read_ahead(parts: Parts, *, threads: int = 1, ahead: int = 2) -> Iterator[Part]:
    """The parts in order, `ahead` of them prepared in `threads` threads while the caller works."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(parts).to_iter_dataset(options))
