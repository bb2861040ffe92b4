"""The one reader and the one writer of safetensors files.

Reading maps the file: names, shapes and metadata cost the header, an array is a read-only view that the kernel pages
in. The safetensors library judges the header; what it lets through (duplicate keys) is refused here. Writing is ours,
because safetensors 0.8.0 silently corrupts arrays that are not C-contiguous and orders metadata at random: we stream
chunk by chunk, so equal input gives equal bytes, and read everything back before the file gets its name.
"""

import hashlib
import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qscope_jax.files.atomic import atomic_path
from qscope_jax.files.recognise import FormatError, describe_file

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the format
_CHUNK = 16 << 20


class TensorInfo(NamedTuple):
    """What the header says of one tensor. `start` is the byte offset in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file, made by `open_tensors`. Holds a map of the file, not its content."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str], data: mmap.mmap):
        self.path = path
        self.metadata = metadata
        self._tensors = tensors
        self._data = data

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in the order of their bytes."""
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of one tensor, from the header alone.

        Raises:
          FormatError: the file has no such tensor.
        """
        if name not in self._tensors:
            raise FormatError(f"{self.path}: expected a tensor {name!r}, found {_some(self.names)}")
        return self._tensors[name]

    def array(self, name: str) -> np.ndarray:
        """One tensor as a read-only view of the mapped file; nothing is read before it is used.

        Raises:
          FormatError: the file has no such tensor.
        """
        dtype, shape, start = self.info(name)
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, buffer=self._data, offset=start)


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a safetensors file, reading its header only.

    Raises:
      FileNotFoundError: there is no such file.
      FormatError: the file is something else, truncated, or has a damaged, ambiguous or unsupported header.
    """
    path = Path(path)
    length = _header_length(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise FormatError(f"{path}: {_cause(path, length, error)}") from None
    with open(path, "rb") as file:
        header = _parse_header(path, file.read(8 + length)[8:])
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    metadata = header.pop("__metadata__", None) or {}
    rows = sorted(header.items(), key=lambda row: row[1]["data_offsets"])
    tensors = {name: _info(path, name, row, 8 + length) for name, row in rows}
    return TensorFile(path, tensors, metadata, data)


def write_tensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays of any memory layout and byte order to a safetensors file, whole or not at all.

    Args:
      path: the file to make or replace. A map of the old file stays valid.
      arrays: name -> NumPy or JAX array, or whatever has `dtype`, `shape` and `__array__`. Made into NumPy once each,
        in the order of `write_order`, and written in chunks: a transposed view of several GB costs no copy in memory.
      metadata: strings only.

    Raises:
      FormatError: a dtype the format does not know, a reserved name, metadata that are not strings.
      OSError: the bytes read back differ from those given, or the disk is full; the old file is then untouched.
    """
    path = Path(path)
    infos = {name: (np.dtype(array.dtype), tuple(array.shape)) for name, array in arrays.items()}
    order = write_order(arrays)
    header = _make_header(path, {name: infos[name] for name in order}, metadata or {})
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(header)
            digests = {name: _write(file, np.asarray(arrays[name])) for name in order}
        _check_written(path, temporary, infos, digests, dict(metadata or {}))


def write_order(arrays: Mapping[str, Any]) -> list[str]:
    """Wide dtypes first, as the library does, so that every tensor starts at a multiple of its item size."""
    return sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))


def _make_header(path: Path, infos: dict[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {}
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FormatError(f"{path}: metadata must be strings, found {key!r}: {value!r}; use json.dumps")
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name, (dtype, shape) in infos.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise FormatError(f"{path}: {name!r} cannot be the name of a tensor")
        code = _CODES.get(_little(dtype))
        if code is None:
            raise FormatError(f"{path}: tensor {name!r} is {dtype}; safetensors holds {_some(DTYPES, 99)}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    if len(text) > _MAX_HEADER:
        raise FormatError(f"{path}: the header takes {len(text):,} bytes, the format allows {_MAX_HEADER:,}")
    return len(text).to_bytes(8, "little") + text


def _little(dtype: np.dtype) -> np.dtype:
    return dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype


def byte_chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of an array in C order and little-endian, in pieces of about 16 MiB."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array
    step = max(1, _CHUNK * len(flat) // max(flat.nbytes, 1))
    for start in range(0, len(flat) if flat.size else 0, step):
        piece = np.ascontiguousarray(flat[start : start + step], dtype=_little(array.dtype))
        yield piece.reshape(-1).view(np.uint8)


def _write(file: BinaryIO, array: np.ndarray) -> bytes:
    """Writes an array's bytes and gives their digest."""
    digest = hashlib.blake2b()
    for chunk in byte_chunks(array):
        file.write(chunk.data)
        digest.update(chunk.data)
    return digest.digest()


def _check_written(path: Path, temporary: Path, infos, digests: dict[str, bytes], metadata: dict[str, str]) -> None:
    written = open_tensors(temporary)
    same = written.metadata == metadata and set(written.names) == set(infos)
    for name, (dtype, shape) in infos.items() if same else ():
        found = written.array(name)
        digest = hashlib.blake2b()
        for chunk in byte_chunks(found):
            digest.update(chunk.data)
        same = same and (found.dtype, found.shape, digest.digest()) == (_little(dtype), shape, digests[name])
    if not same:
        raise OSError(f"{path}: the bytes read back differ from those written; check the disk. Nothing was replaced")


def same_bytes(given: np.ndarray, found: np.ndarray) -> bool:
    """True if `found`, C-contiguous, holds exactly the shape, dtype and bits of `given`, whatever layout that has."""
    if found.shape != given.shape or found.dtype != _little(given.dtype):
        return False
    data, end = found.reshape(-1).view(np.uint8), 0
    for chunk in byte_chunks(given):
        start, end = end, end + len(chunk)
        if not np.array_equal(data[start:end], chunk):
            return False
    return end == len(data)


def _header_length(path: Path) -> int:
    """The length the file claims for its header, after the checks that tell common accidents apart."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        first = file.read(1)
    if size < 8 or first != b"{":
        raise FormatError(f"{path}: expected a safetensors file, found {describe_file(path)}")
    if length > _MAX_HEADER:
        raise FormatError(f"{path}: the header claims {length:,} bytes, the format allows {_MAX_HEADER:,}")
    if 8 + length > size:
        raise FormatError(f"{path}: truncated: the header ends at byte {8 + length:,}, the file at {size:,}; {_AGAIN}")
    return length


_AGAIN = "download or write it again"


def _cause(path: Path, length: int, error: Exception) -> str:
    """Names a truncated or padded file by numbers; else hands on what the library said."""
    said = str(error).removeprefix("Error while deserializing header: ")
    if "not fully covered" in said or "InvalidBuffer" in said:
        with open(path, "rb") as file:
            header = _parse_header(path, file.read(8 + length)[8:])
        ends = [row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"]
        expected, found = 8 + length + max(ends, default=0), path.stat().st_size
        word = "truncated" if found < expected else "followed by bytes that belong to no tensor"
        return f"{word}: expected {expected:,} bytes, found {found:,}; {_AGAIN}"
    return f"damaged safetensors header: {said}; {_AGAIN}"


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            raise FormatError(f"{path}: the header names {_some(twice)} twice; {_AGAIN}")
        return result

    return json.loads(text, object_pairs_hook=unique)


def _info(path: Path, name: str, row: dict[str, Any], base: int) -> TensorInfo:
    extra = set(row) - {"dtype", "shape", "data_offsets"}
    if extra:
        raise FormatError(f"{path}: tensor {name!r} has the unknown entry {_some(sorted(extra))} in the header")
    if row["dtype"] not in DTYPES:
        raise FormatError(f"{path}: tensor {name!r} is {row['dtype']}, which is not supported; known: {_some(DTYPES)}")
    return TensorInfo(DTYPES[row["dtype"]], tuple(row["shape"]), base + row["data_offsets"][0])


def _some(names: Any, limit: int = 8) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
