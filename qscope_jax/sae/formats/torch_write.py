"""Writes the file that `torch.save({name: tensor})` would write, without torch; `torch.load` reads it unchanged.

The layout is torch's own (protocol 2 pickle, stored members, storages at multiples of 64 bytes, so that
`torch.load(mmap=True)` works). Everything is read back by our strict reader before the file gets its name.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from qscope_jax.files.atomic import atomic_path
from qscope_jax.files.recognise import FormatError
from qscope_jax.files.tensors import byte_chunks, same_bytes
from qscope_jax.sae.formats.torch_pickle import ORDERED_DICT, REBUILD, STORAGES, open_torch

_GLOBAL_OF = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64
_ZIP64_FROM = 1 << 30  # early, so that whether a member needs the long header is ours to know before it is written


def write_torch(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes a dict of float32, float16 or bfloat16 arrays, whole or not at all, in chunks.

    Raises:
      FormatError: another dtype, or an array without elements.
      OSError: the bytes read back differ from those given; an old file is then untouched.
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            root = path.stem
            _add(archive, file, f"{root}/data.pkl", [np.frombuffer(_pickle(path, arrays), np.uint8)])
            _add(archive, file, f"{root}/byteorder", [np.frombuffer(b"little", np.uint8)])
            for number, array in enumerate(arrays.values()):
                _add(archive, file, f"{root}/data/{number}", byte_chunks(np.asarray(array)), array.nbytes)
            _add(archive, file, f"{root}/version", [np.frombuffer(b"3\n", np.uint8)])
        written = open_torch(temporary)
        if not all(same_bytes(np.asarray(array), written[name].array) for name, array in arrays.items()):
            raise OSError(
                f"{path}: the bytes read back differ from those written; check the disk. Nothing was replaced"
            )


def _add(archive: zipfile.ZipFile, file: IO[bytes], name: str, chunks: Any, size: int = 0) -> None:
    long = size >= _ZIP64_FROM
    info = zipfile.ZipInfo(name)
    info.file_size = size
    # The field that torch pads with: two letters, a length, and as many bytes as bring the data to the boundary.
    start = file.tell() + 30 + len(name.encode()) + 4 + (20 if long else 0)
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=long) as member:
        for chunk in chunks:
            member.write(chunk.data)


def _pickle(path: Path, arrays: Mapping[str, Any]) -> bytes:
    named = enumerate(arrays.items())
    items = b"".join(_text(name) + _tensor(path, number, name, array) for number, (name, array) in named)
    return b"\x80\x02}(" + items + b"u."


def _tensor(path: Path, number: int, name: str, array: Any) -> bytes:
    storage = _GLOBAL_OF.get(np.dtype(array.dtype))
    if storage is None or not array.size:
        known = ", ".join(str(dtype) for dtype in _GLOBAL_OF)
        raise FormatError(f"{path}: {name!r} is {array.dtype} {tuple(array.shape)}; expected {known}, not empty")
    strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(len(array.shape))]
    identity = _text("storage") + _global(storage) + _text(str(number)) + _text("cpu") + _int(array.size)
    parts = b"(" + identity + b"tQ" + _int(0) + _ints(array.shape) + _ints(strides) + b"\x89" + _global(ORDERED_DICT)
    return _global(REBUILD) + b"(" + parts + b")R" + b"tR"


def _global(name: str) -> bytes:
    module, attribute = name.split(" ")
    return f"c{module}\n{attribute}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _ints(values: Any) -> bytes:
    return b"(" + b"".join(_int(int(value)) for value in values) + b"t"


def _int(value: int) -> bytes:
    """BININT where it fits, else LONG1."""
    if value < 1 << 31:
        return b"J" + value.to_bytes(4, "little")
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
