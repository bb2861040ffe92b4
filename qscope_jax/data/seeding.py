"""What a seed decides, by number: 64 bits for each, the same on every machine and in every order of asking."""

from typing import Literal

import numpy as np

Split = Literal["train", "held-out"]


def make_key(*words: int) -> int:
    """64 bits for one use of a seed."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def hash_numbers(key: int, numbers: np.ndarray) -> np.ndarray:
    """uint64, well mixed, other for every number (steps and finaliser of splitmix64, Steele et al. 2014)."""
    x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(key: int, numbers: np.ndarray) -> np.ndarray:
    """A float64 in [0, 1) for each number."""
    return (hash_numbers(key, numbers) >> np.uint64(11)) * 2.0**-53


def number_type(count: int) -> np.dtype:
    """The smallest type for the numbers of so many documents: there may be hundreds of millions."""
    return np.dtype(np.uint32 if count <= 1 << 32 else np.uint64)


def split_documents(documents: int, split: Split, share: float, seed: int) -> np.ndarray:
    """The numbers of the documents in a split, ascending: held out are those whose numbers have the smallest hashes.

    Exactly round(share * documents) are held out, at least one where share > 0. Equal texts are different documents.
    """
    numbers = np.arange(documents, dtype=number_type(documents))
    count = min(max(1, round(share * documents)), documents) if share > 0 else 0
    if not count:
        return numbers if split == "train" else numbers[:0]
    hashes = hash_numbers(make_key(seed), numbers)
    held = hashes <= np.partition(hashes, count - 1)[count - 1]
    return numbers[held if split == "held-out" else ~held]
