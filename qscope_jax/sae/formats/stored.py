"""What each file format hands over, mapped arrays and the checksums promised for them, and the way into JAX.

One pass over the file does all the work: each chunk is checked against the checksum, checked for NaN and Inf, cast,
and laid into the final array. That array is aligned so that JAX on the CPU adopts it instead of copying it; loading
therefore peaks at the size of the arrays themselves.
"""

import hashlib
import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qscope_jax.files.recognise import FormatError

_ALIGNMENT = 64  # what JAX's CPU client asks of a buffer it adopts
_CHUNK = 2 << 20  # stays in the cache between the check, the cast and the transposed write
_Bounds = tuple[tuple[int, int], ...]  # first and one past the last index along each axis
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


def place(
    stored: StoredTensor,
    dtype: np.dtype,
    *,
    where: str,
    allow_nonfinite: bool = False,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """Reads a stored tensor once and returns it as a JAX array of `dtype`, by default on the default device.

    With a sharding, only the slices that this process's devices hold are read; the checksum can then be verified only
    where they make up the whole tensor, as they do in a single process.

    Raises:
      FormatError: the checksum does not match, values are NaN or infinite, or do not fit into `dtype`.
    """
    holders = _holders(sharding, stored.array.shape)
    parts = {bounds: _aligned(tuple(stop - start for start, stop in bounds), dtype) for bounds in holders}
    found, bad, lost = _read(stored, parts)
    if stored.checksum and found not in (None, stored.checksum.expected):
        raise FormatError(
            f"{where}: the data are damaged: expected {stored.checksum.kind} {stored.checksum.expected}, "
            f"found {found}; download or write the file again"
        )
    if bad and not allow_nonfinite:
        raise FormatError(
            f"{where}: {bad:,} of {stored.array.size:,} values are NaN or infinite, expected none; "
            "the file is damaged or the training diverged (allow_nonfinite=True loads it all the same)"
        )
    if lost:
        raise FormatError(f"{where}: {lost:,} values do not fit into {dtype}; load it as float32 or bfloat16")
    arrays = [jax.device_put(parts[bounds], device) for bounds, devices in holders.items() for device in devices]
    if sharding is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(stored.array.shape, sharding, arrays)


def _holders(sharding: NamedSharding | None, shape: tuple[int, ...]) -> dict[_Bounds, list[Any]]:
    """The distinct slices of an array that this process holds, and the devices that hold each."""
    if sharding is None:
        return {tuple((0, size) for size in shape): [None]}
    holders: dict[_Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    return holders


def _read(stored: StoredTensor, parts: dict[_Bounds, np.ndarray]) -> tuple[str | None, int, int]:
    """Fills slices of a tensor in one pass over the file.

    Returns the checksum, None where there is none or the parts are not the whole tensor, and how many values were NaN
    or infinite in the file, and how many became so in the parts' dtype.
    """
    source = stored.array
    # Chunks follow the order of the file, whatever order the result has.
    axes = sorted(range(source.ndim), key=lambda axis: -source.strides[axis])
    file = source.transpose(axes)
    targets = [([bounds[axis] for axis in axes], part.transpose(axes)) for bounds, part in parts.items()]
    whole = sum(part.size for part in parts.values()) == source.size
    running = Running(stored.checksum.kind) if stored.checksum and whole else None
    bad = lost = 0
    for start, stop in _blocks(file):
        if running:
            running.update(file[start:stop])
        for ((first, last), *others), target in targets:
            begin, end = max(start, first), min(stop, last)
            if begin >= end:
                continue
            chunk, written = file[begin:end, *(slice(*bound) for bound in others)], target[begin - first : end - first]
            with np.errstate(over="ignore", invalid="ignore"):
                written[...] = chunk
            wrong = _count_nonfinite(chunk)
            bad += wrong
            if target.dtype != source.dtype:
                lost += _count_nonfinite(written) - wrong
    return running.result() if running else None, bad, lost


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
