"""Documents without a file: seeded random tokens, frequent ones first, with passages that come again."""

from typing import Any

import numpy as np

_PASSAGE = 16  # tokens that are repeated as one
_REPEATED = 0.25  # share of passages that repeat another of their document


class SyntheticDocuments:
    """A `DocumentSource` of random documents; document i depends on the arguments and i alone.

    Ids follow Zipf's law, p(id) ~ 1 / (id + 1), over the whole vocabulary; lengths are exponential, on average
    `mean_length` tokens; a quarter of the passages of 16 tokens are copies.
    """

    name = "synthetic"

    def __init__(self, vocab_size: int, *, documents: int = 1 << 20, mean_length: int = 512, seed: int = 0):
        if min(vocab_size, documents, mean_length) < 1:
            raise ValueError(f"vocab_size = {vocab_size}, documents = {documents}, mean_length = {mean_length}: < 1")
        self._vocab_size, self._documents, self._mean_length, self._seed = vocab_size, documents, mean_length, seed

    def __len__(self) -> int:
        return self._documents

    def read(self, number: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[self._seed, number]))
        length = 1 + int(-np.log1p(-rng.random()) * self._mean_length)
        passages = -(-length // _PASSAGE)
        draws = rng.random((passages, _PASSAGE + 2))
        ids = (float(self._vocab_size + 1) ** draws[:, :_PASSAGE]).astype(np.int64) - 1
        place = np.arange(passages)
        source = np.where(draws[:, -1] < _REPEATED, (draws[:, -2] * (place + 1)).astype(np.int64), place)
        return np.minimum(ids, self._vocab_size - 1)[source].ravel()[:length].astype(np.int32)

    def place(self, number: int) -> str:
        return f"synthetic:{number + 1}"

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": "synthetic",
            "vocab_size": self._vocab_size,
            "documents": self._documents,
            "mean_length": self._mean_length,
            "seed": self._seed,
        }
