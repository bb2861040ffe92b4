"""Where several processes must decide alike; each function is called by all of them, and costs nothing for one."""

import hashlib
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def everywhere(fine: bool) -> bool:
    """True if it is true on every process."""
    return fine if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def agreed(text: str) -> bool:
    """True if every process passes the same text."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool(np.all(multihost_utils.process_allgather(digest) == digest))


def from_first_process(numbers: list[int]) -> list[int]:
    """The numbers, below 2^31, that process 0 passes."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(numbers), np.int32)))
    own = (numbers + [0] * count)[:count]  # what others pass has the shape of process 0's
    return [int(number) for number in multihost_utils.broadcast_one_to_all(np.asarray(own, np.int32))]


def from_all(entries: list[Any]) -> list[Any]:
    """The entries of all processes, which JSON can hold, in the order of the processes; equal on all."""
    if jax.process_count() == 1:
        return entries
    own = np.frombuffer(json.dumps(entries).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(own), np.int32))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(own)] = own
    texts = multihost_utils.process_allgather(padded)
    return [entry for text, size in zip(texts, sizes, strict=True) for entry in json.loads(bytes(text[:size]))]
