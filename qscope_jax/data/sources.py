"""What the training feed reads: documents as token ids, by number, from whatever source."""

from typing import Any, Protocol

import numpy as np

from qscope_jax.data.seeding import Split


class DocumentSource(Protocol):
    """Documents as token ids, by number; safe to read from several threads."""

    name: str

    def __len__(self) -> int: ...
    def read(self, number: int) -> np.ndarray | str:
        """Token ids [n], n > 0, or the reason why there are none."""
        ...

    def place(self, number: int) -> str:
        """What messages call the document."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able: everything that decides what `read` gives."""
        ...


class ChosenDocuments:
    """The documents of a source that are in a split, a data source for grain."""

    def __init__(self, source: DocumentSource, numbers: np.ndarray, vocab_size: int):
        self.source, self._numbers, self._vocab_size = source, numbers, vocab_size

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> np.ndarray | str:
        number = int(self._numbers[index])
        found = self.source.read(number)
        if isinstance(found, str):
            return f"{self.source.place(number)}: {found}"
        if not 0 <= found.min() <= found.max() < self._vocab_size:
            raise ValueError(
                f"{self.source.place(number)}: token ids from {found.min()} to {found.max()}; the model has rows for "
                f"0..{self._vocab_size - 1}: data, tokenizer and model do not belong together"
            )
        return found

    def check(self, shards: int, split: Split, held_out: float) -> None:
        if len(self) < shards:
            raise ValueError(
                f"{self.source.name}: {len(self)} document(s) in the split {split!r} (of {len(self.source)}, "
                f"{held_out:g} held out), but {shards} virtual shards need one each: take fewer shards, hold out "
                "another share, or give more documents"
            )
