"""What each file format hands over, mapped arrays and the checksums promised for them, and the way into JAX.

One pass over the file does all the work: each chunk is checked against the checksum, checked for NaN and Inf, cast,
and laid into the final array. That array is aligned so that JAX on the CPU adopts it instead of copying it; loading
therefore peaks at the size of the arrays themselves.
"""

import hashlib
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.files.recognise import FormatError

_ALIGNMENT = 64  # what JAX's CPU client asks of a buffer it adopts
_CHUNK = 2 << 20  # stays in the cache between the check, the cast and the transposed write
_ROWS = 16  # so that a transposed write fills whole cache lines, however long the rows are


class Checksum(NamedTuple):
    """What the bytes of a tensor, in the order of the file, must hash to."""

    kind: Literal["crc32", "sha256"]
    expected: str


class StoredTensor(NamedTuple):
    """One tensor as it lies in its file: a read-only view, C-contiguous or a permutation of such."""

    array: np.ndarray
    checksum: Checksum | None = None

    def transposed(self) -> "StoredTensor":
        return StoredTensor(self.array.T, self.checksum)


class Running:
    """A checksum in the making."""

    def __init__(self, kind: str):
        self.crc, self.sha = 0, hashlib.sha256() if kind == "sha256" else None

    def update(self, chunk: np.ndarray) -> None:
        data = chunk.reshape(-1).view(np.uint8).data
        if self.sha is not None:
            self.sha.update(data)
        else:
            self.crc = zlib.crc32(data, self.crc)

    def result(self) -> str:
        return self.sha.hexdigest() if self.sha is not None else f"{self.crc:08x}"


def sha256_of(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes in C order, without a copy of the whole."""
    running = Running("sha256")
    for start, stop in _blocks(array):
        running.update(np.ascontiguousarray(array[start:stop]))
    return running.result()


def place(stored: StoredTensor, dtype: np.dtype, *, where: str, allow_nonfinite: bool = False) -> jax.Array:
    """Reads a stored tensor once and returns it as a JAX array of `dtype` on the default device.

    Raises:
      FormatError: the checksum does not match, values are NaN or infinite, or do not fit into `dtype`.
    """
    source = stored.array
    # Chunks follow the order of the file, whatever order the result has.
    axes = sorted(range(source.ndim), key=lambda axis: -source.strides[axis])
    target = _aligned(source.shape, dtype)
    read, write = source.transpose(axes), target.transpose(axes)
    running = Running(stored.checksum.kind) if stored.checksum else None
    bad = lost = 0
    for start, stop in _blocks(read):
        chunk = read[start:stop]
        if running:
            running.update(chunk)
        with np.errstate(over="ignore", invalid="ignore"):
            write[start:stop] = chunk
        wrong = _count_nonfinite(chunk)
        bad += wrong
        if dtype != source.dtype:
            lost += _count_nonfinite(write[start:stop]) - wrong
    if running and stored.checksum and running.result() != stored.checksum.expected:
        raise FormatError(
            f"{where}: the data are damaged: expected {stored.checksum.kind} {stored.checksum.expected}, "
            f"found {running.result()}; download or write the file again"
        )
    if bad and not allow_nonfinite:
        raise FormatError(
            f"{where}: {bad:,} of {source.size:,} values are NaN or infinite, expected none; "
            "the file is damaged or the training diverged (allow_nonfinite=True loads it all the same)"
        )
    if lost:
        raise FormatError(f"{where}: {lost:,} values do not fit into {dtype}; load it as float32 or bfloat16")
    return jax.device_put(target)


def _blocks(array: np.ndarray) -> Iterator[tuple[int, int]]:
    step = max(_ROWS, _CHUNK * len(array) // max(array.nbytes, 1))
    for start in range(0, len(array), step):
        yield start, start + step


def _count_nonfinite(chunk: np.ndarray) -> int:
    return chunk.size - int(np.count_nonzero(np.isfinite(chunk)))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def as_dtype(name: str | np.dtype | type) -> np.dtype:
    """The float type an SAE can have, from its name.

    Raises:
      ValueError: any other type.
    """
    known = ("float32", "bfloat16", "float16")
    dtype = jnp.dtype(name)
    if dtype.name not in known:
        raise ValueError(f"dtype {name!r}: expected one of {', '.join(known)}")
    return dtype
