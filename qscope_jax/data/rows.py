"""Random access to the rows of one file: JSONL and text by an index of line offsets, parquet by row groups.

A row is a record (field -> value), or a reason why there is none. Nothing here raises for a bad row.
"""

import hashlib
import json
import os
import threading
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qscope_jax.data.inputs import DataFile, open_plain

_CHUNK = 16 << 20
_BOM = b"\xef\xbb\xbf"


class RawRow(NamedTuple):
    """A record, or why there is none."""

    record: dict[str, Any] | None
    error: str | None


class Unreadable(str):
    """Stands for a cell that cannot be read; the text is the reason."""


class RowFile(Protocol):
    """One input file. `sizes()` are bytes per row, exact or (parquet) averaged; `digest` is its SHA-256."""

    file: DataFile
    digest: str

    def __len__(self) -> int: ...
    def sizes(self) -> np.ndarray: ...
    def read(self, start: int, stop: int) -> list[RawRow]: ...


def open_rows(file: DataFile, fields: tuple[str, ...], *, whole: bool, max_bytes: int) -> RowFile:
    """Opens one file, scanning it once.

    Args:
      file: what and where.
      fields: the columns that will be asked for; the first is the text.
      whole: a text file is one document instead of one per line.
      max_bytes: a longer line (or whole text file) is an error of that row, and is never read into memory.

    Raises:
      ValueError: a file that is damaged as a whole.
    """
    if file.format == "parquet":
        return ParquetRows(file, fields)
    return LineRows(file, fields[0], whole=whole, max_bytes=max_bytes)


class LineRows:
    """JSONL or text through the offsets of its lines; a BOM at the start and CR before LF are not part of a row."""

    def __init__(self, file: DataFile, text_field: str, *, whole: bool, max_bytes: int):
        self.file, self._field, self._max = file, text_field, max_bytes
        self._descriptor = open_plain(file)
        self._whole = whole and file.format == "text"
        self._offsets, self.digest = _scan_lines(self._descriptor, split=not self._whole)

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def sizes(self) -> np.ndarray:
        return np.diff(self._offsets)

    def read(self, start: int, stop: int) -> list[RawRow]:
        return [self._row(i) for i in range(start, stop)]

    def _row(self, i: int) -> RawRow:
        begin, size = int(self._offsets[i]), int(self._offsets[i + 1] - self._offsets[i])
        if size > self._max:
            return RawRow(None, f"{size:,} bytes; expected at most {self._max:,} (--max-row-bytes)")
        data = os.pread(self._descriptor, size, begin)
        if len(data) != size:
            raise OSError(f"{self.file.path} became shorter while it was read")
        if i == 0:
            data = data.removeprefix(_BOM)
        if not self._whole:
            data = data.removesuffix(b"\n").removesuffix(b"\r")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            return RawRow(None, f"not UTF-8: byte {data[error.start]:#04x} at position {error.start}")
        return RawRow({self._field: text}, None) if self.file.format == "text" else parse_json(text)


def parse_json(text: str) -> RawRow:
    """One line of JSONL as a record."""
    if not text.strip():
        return RawRow(None, "blank line")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return RawRow(None, f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return RawRow(None, "not readable JSON: nested too deeply")
    except ValueError as error:  # an integer of thousands of digits
        return RawRow(None, f"not readable JSON: {error}")
    if not isinstance(record, dict):
        return RawRow(None, f"expected a JSON object per line, found {type(record).__name__}")
    return RawRow(record, None)


def _scan_lines(descriptor: int, *, split: bool) -> tuple[np.ndarray, str]:
    """Offsets [rows + 1] of the lines and the SHA-256 of the content."""
    digest, position, ends = hashlib.sha256(), 0, [np.zeros(1, np.int64)]
    while chunk := os.pread(descriptor, _CHUNK, position):
        digest.update(chunk)
        if split:
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + (position + 1))
        position += len(chunk)
    offsets = np.concatenate(ends)
    if offsets[-1] != position:
        offsets = np.append(offsets, position)
    return offsets, digest.hexdigest()


class ParquetRows:
    """Parquet; the row group read last stays in memory, because parts walk through it in order."""

    def __init__(self, file: DataFile, fields: tuple[str, ...]):
        self.file = file
        try:
            self._parquet = pq.ParquetFile(file.path, page_checksum_verification=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file.path}: damaged or cut short parquet file ({error})") from None
        self.schema = self._parquet.schema_arrow
        self._columns = [name for name in fields if name in self.schema.names]
        groups = [self._parquet.metadata.row_group(g) for g in range(self._parquet.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._bytes = [group.total_byte_size for group in groups]
        self._lock, self._last = threading.Lock(), (-1, pa.table({}))
        with open(file.path, "rb") as content:
            self.digest = hashlib.file_digest(content, "sha256").hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sizes(self) -> np.ndarray:
        rows = np.diff(self._starts)
        return np.repeat(np.array(self._bytes, np.int64) // np.maximum(rows, 1), rows)

    def read(self, start: int, stop: int) -> list[RawRow]:
        rows: list[RawRow] = []
        while start < stop:
            group = int(np.searchsorted(self._starts, start, side="right")) - 1
            first, end = int(self._starts[group]), int(min(self._starts[group + 1], stop))
            table = self._group(group).slice(start - first, end - start)
            columns = {name: _cells(table.column(name)) for name in self._columns}
            rows += [RawRow({n: c[i] for n, c in columns.items()}, None) for i in range(end - start)]
            start = end
        return rows

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if self._last[0] != group:
                try:
                    table = self._parquet.read_row_group(group, columns=self._columns)
                except (pa.ArrowException, OSError) as error:
                    raise ValueError(f"{self.file.path}: row group {group} is damaged ({error})") from None
                self._last = (group, table)
            return self._last[1]


def _cells(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; a text that is no UTF-8 (parquet does not check) becomes `Unreadable`."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.to_pylist()
    return [None if cell is None else _decoded(cell) for cell in column.cast(pa.large_binary()).to_pylist()]


def _decoded(cell: bytes) -> str:
    try:
        return cell.decode("utf-8")
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8: byte {cell[error.start]:#04x} at position {error.start}")
