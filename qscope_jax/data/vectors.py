"""Residual vectors of one layer, made by others and kept in files: rows of neighbours, in a seeded order.

Files are `.npy` or safetensors with one array [n, d], read in place. A row holds the vectors of t neighbouring tokens
of one file, so that it means what a row of tokens means: training mixes both alike.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qscope_jax.data.seeding import Split, hash_numbers, make_key, split_documents
from qscope_jax.files.remote import open_remote
from qscope_jax.files.tensors import open_tensors

_ENDINGS = (".npy", ".safetensors")
_ENDS = 1 << 20  # bytes at either end of a file that its fingerprint looks at


class VectorRows(NamedTuple):
    """Rows of vectors [rows, t, d] and which of them are real [rows, t]: the last row of a file may be short.

    What is not real is zero.
    """

    x: np.ndarray
    mask: np.ndarray


class VectorFile(NamedTuple):
    """One file: its vectors [n, d], not read yet."""

    path: Path
    vectors: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """What the vectors are given out as: float32 where they are wider, which no device trains on."""
        stored = self.vectors.dtype
        return np.dtype(np.float32) if stored.itemsize > 4 else stored.newbyteorder("=")


class VectorFeed:
    """An endless iterator of `VectorRows`, made by `open_vectors`; state and fingerprint are as those of a `Feed`.

    `dtype` is that of the rows given out, float32 where files hold float64; `documents` is the number of rows.
    """

    def __init__(
        self,
        files: Sequence[VectorFile],
        blocks: np.ndarray,
        rows: int,
        own: Sequence[int],
        fingerprint: dict[str, Any],
    ):
        self.fingerprint, self.d, self.dtype = fingerprint, files[0].vectors.shape[1], files[0].dtype
        self.documents, self._once = (len(blocks),), fingerprint["once"]
        self._files, self._blocks, self._own = files, blocks, own
        self._shards, self._length, self._seed = (fingerprint[name] for name in ("shards", "row_length", "seed"))
        self._rows, self._given = rows // self._shards, 0
        self._order: tuple[int, np.ndarray] = (-1, blocks)

    def __iter__(self) -> "VectorFeed":
        return self

    def __next__(self) -> VectorRows:
        shape = (len(self._own) * self._rows, self._length)
        x = np.zeros((*shape, self.d), self.dtype)
        mask = np.zeros(shape, bool)
        places = (self._given + row for _ in self._own for row in range(self._rows))
        shards = (shard for shard in self._own for _ in range(self._rows))
        for i, (place, shard) in enumerate(zip(places, shards, strict=True)):
            if self._once and place * self._shards + shard >= len(self._blocks):
                continue
            file, begin = self._blocks[self._block(place * self._shards + shard)]
            found = self._files[file].vectors[begin : begin + self._length]
            x[i, : len(found)], mask[i, : len(found)] = found, True
        self._given += self._rows
        return VectorRows(x, mask)

    def state(self) -> list[dict[str, Any]]:
        """The position after the last batch given out, one JSON-able entry per own shard."""
        return [{"shard": shard, "row": self._given} for shard in self._own]

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Goes on from `state()` of a feed of equal fingerprint, whoever read these shards then.

        Raises:
          ValueError: an own shard has no entry.
        """
        rows = {state["shard"]: state["row"] for state in states}
        if missing := [shard for shard in self._own if shard not in rows]:
            raise ValueError(f"no position of shard(s) {missing}; positions are of {sorted(rows)}")
        self._given = rows[self._own[0]]

    @property
    def counts(self) -> dict[str, int]:
        """Rows with vectors given out to this process, over all epochs."""
        ends = [len(range(shard, len(self._blocks), self._shards)) for shard in self._own]
        return {"documents": sum(min(self._given, end) if self._once else self._given for end in ends), "skipped": 0}

    def close(self) -> None:
        """Nothing is open that must be closed."""

    def _block(self, number: int) -> int:
        """Which block is number `number` of the endless order; every epoch has an order of its own."""
        epoch, place = divmod(number, len(self._blocks))
        if self._order[0] != epoch:
            keys = hash_numbers(make_key(self._seed, 3, epoch), np.arange(len(self._blocks)))
            self._order = (epoch, np.argsort(keys, kind="stable"))
        return int(self._order[1][place])


def open_vectors(
    names: Sequence[str],
    *,
    d: int,
    row_length: int,
    rows: int,
    shards: int,
    own: Sequence[int] | None = None,
    seed: int,
    split: Split = "train",
    held_out: float = 0.0,
    once: bool = False,
) -> VectorFeed:
    """Vectors of width `d` in global batches of `rows` x `row_length`; the arguments are those of `open_feed`.

    What is held out, and comes `once`, are rows. float64, NumPy's own choice, is given out as float32. A fingerprint
    knows names, shapes and the first and last mebibyte of every file.

    Args:
      names: files, or folders of such files, here or at fsspec addresses, which are copied into the cache.
      d: the width that vectors must have.

    Raises:
      FileNotFoundError: a name is no such file and no folder of some.
      SourceError: a remote address does not exist or cannot be read.
      ValueError: an array that is not floating [n, d], files of different types, or fewer rows than shards.
    """
    files = [_open(path, d) for name in names for path in _find(name)]
    if len({file.dtype for file in files}) > 1:
        raise ValueError(f"files of {sorted({str(file.vectors.dtype) for file in files})}: expected one type for all")
    if min(rows, shards, row_length) < 1 or rows % shards:
        raise ValueError(f"rows = {rows}, shards = {shards}, row_length = {row_length}: shards must divide rows")
    own = range(shards) if own is None else [int(shard) for shard in own]
    if not own or len(set(own) & set(range(shards))) < len(own):
        raise ValueError(f"own = {own}; expected shards among 0..{shards - 1}, each once")
    begins = [(i, begin) for i, file in enumerate(files) for begin in range(0, len(file.vectors), row_length)]
    blocks = np.array(begins, np.int64)[split_documents(len(begins), split, held_out, 0)]
    if len(blocks) < shards:
        raise ValueError(
            f"{len(blocks)} rows of {row_length} vectors in the split {split!r}, but {shards} virtual shards need one "
            "each: take fewer shards or shorter rows, or give more vectors"
        )
    fingerprint = {
        "kind": "vectors", "files": [_identity(file) for file in files], "row_length": row_length, "rows": rows,
        "shards": shards, "seed": seed, "split": split, "held_out": held_out, "once": once,
    }  # fmt: skip
    return VectorFeed(files, blocks, rows, own, fingerprint)


def _find(name: str) -> list[Path]:
    if "://" in name:
        place, only = open_remote(name)
        # Files below further folders are left alone, as they are in a folder on disk.
        found = [place.fetch(n) for n in place.names() if only or ("/" not in n and n.endswith(_ENDINGS))]
    else:
        path = Path(name).expanduser()
        found = sorted(p for p in path.iterdir() if p.suffix in _ENDINGS) if path.is_dir() else [path]
    if not found or not found[0].exists():
        raise FileNotFoundError(f"{name}: no .npy or .safetensors file of residual vectors is there")
    return found


def _open(path: Path, d: int) -> VectorFile:
    if path.suffix == ".npy":
        vectors = np.load(path, mmap_mode="r")
    elif path.suffix == ".safetensors":
        file = open_tensors(path)
        if len(names := file.names) != 1:
            raise ValueError(f"{path}: holds {', '.join(names[:4])}; expected one array, the vectors [n, {d}]")
        vectors = file.array(names[0])
    else:
        raise ValueError(f"{path}: expected .npy or .safetensors with vectors [n, {d}]")
    floating = np.issubdtype(vectors.dtype, np.floating) or vectors.dtype.name == "bfloat16"
    if vectors.ndim != 2 or vectors.shape[1] != d or not floating or not len(vectors):
        raise ValueError(f"{path}: holds {vectors.dtype} {vectors.shape}; expected floating [n, {d}]")
    return VectorFile(path, vectors)


def _identity(file: VectorFile) -> dict[str, Any]:
    digest, size = hashlib.sha256(), file.path.stat().st_size
    with open(file.path, "rb") as content:
        digest.update(content.read(_ENDS))
        content.seek(max(0, size - _ENDS))
        digest.update(content.read(_ENDS))
    return {"name": file.path.name, "shape": list(file.vectors.shape), "bytes": size, "ends": digest.hexdigest()}
