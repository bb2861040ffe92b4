"""Parquet columns of a corpus in one unnamed temporary file, so that single rows are read in any order.

Parquet is read by whole row groups: drawing documents at random would decompress a group for each. One pass at the
start writes the column's plain bytes; a row is then one read at a known place.
"""

import errno
import os
import tempfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qscope_jax.data.inputs import DataFile
from qscope_jax.data.rows import ParquetRows, RawRow, Unreadable

_TOKENS = np.dtype("<u4")


class Spool:
    """The temporary file, shared by all parquet files of a corpus; it vanishes with this object."""

    def __init__(self):
        with tempfile.TemporaryFile() as file:
            self._descriptor = os.dup(file.fileno())
        self._size = 0

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def write(self, data: memoryview) -> int:
        """Appends and says where."""
        start = self._size
        try:
            while len(data):
                written = os.write(self._descriptor, data)
                data, self._size = data[written:], self._size + written
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                error.errno, f"no space left in {tempfile.gettempdir()} for the plain text of parquet files, after "
                f"{self._size / 1e9:.1f} GB: set TMPDIR to a folder on a larger disk"
            ) from None  # fmt: skip
        return start

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, start)


class SpooledRows:
    """One column of a parquet file, texts or lists of token ids, each row read by itself; a `RowFile`.

    Raises:
      ValueError: the file is damaged, or its column is neither strings nor lists of ids.
    """

    def __init__(self, file: DataFile, field: str, spool: Spool, *, tokens: bool):
        rows = ParquetRows(file, (field,))
        self.file, self.digest, self._field, self._spool, self._tokens = file, rows.digest, field, spool, tokens
        self._has_field = field in rows.schema.names
        self._nulls = np.zeros(len(rows), bool)
        starts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        if self._has_field:
            self._check_type(rows.schema.field(field).type)
            for column in self._columns():
                self._nulls[sum(map(len, sizes)) :][: len(column)] = column.is_null().to_numpy(zero_copy_only=False)
                data, ends = _plain_tokens(column) if tokens else _plain_text(column)
                starts.append(spool.write(data) + ends[:-1])
                sizes.append(np.diff(ends))
        self._starts, self._sizes = np.concatenate(starts), np.concatenate(sizes)

    def __len__(self) -> int:
        return len(self._nulls)

    def sizes(self) -> np.ndarray:
        return self._sizes

    def read(self, start: int, stop: int) -> list[RawRow]:
        return [RawRow(self._record(row), None) for row in range(start, stop)]

    def _record(self, row: int) -> dict[str, Any]:
        if not self._has_field:
            return {}
        if self._nulls[row]:
            return {self._field: None}
        data = self._spool.read(int(self._starts[row]), int(self._sizes[row]))
        if self._tokens:
            return {self._field: np.frombuffer(data, _TOKENS)}
        try:
            return {self._field: data.decode("utf-8")}
        except UnicodeDecodeError as error:
            reason = f"not UTF-8: byte {data[error.start]:#04x} at position {error.start}"
            return {self._field: Unreadable(reason)}

    def _columns(self):
        """The column, by row group."""
        parquet = pq.ParquetFile(self.file.path, page_checksum_verification=True)
        for group in range(parquet.num_row_groups):
            try:
                column = parquet.read_row_group(group, columns=[self._field]).column(self._field)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{self.file.path}: row group {group} is damaged ({error})") from None
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            try:
                yield column.cast(pa.large_list(pa.uint32()) if self._tokens else pa.large_binary()).combine_chunks()
            except pa.ArrowInvalid as error:
                raise ValueError(f"{self.file.path}: column {self._field!r}, row group {group}: {error}") from None

    def _check_type(self, kind: pa.DataType) -> None:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        good = lists and pa.types.is_integer(kind.value_type) if self._tokens else _is_text(kind)
        if not good:
            wanted = "lists of token ids" if self._tokens else "text"
            raise ValueError(f"{self.file.path}: column {self._field!r} holds {kind}; expected {wanted}")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _plain_text(column: pa.Array) -> tuple[memoryview, np.ndarray]:
    """The bytes of a large_binary array, and where its rows begin and end among them [rows + 1]."""
    column = pc.fill_null(column, b"")
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset :][: len(column) + 1]
    data = memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]]
    return data, offsets - offsets[0]


def _plain_tokens(column: pa.Array) -> tuple[memoryview, np.ndarray]:
    """The same of lists of ids; an id that is null stands as 2**32 - 1, which no vocabulary has."""
    lengths = pc.fill_null(column.value_lengths(), 0).to_numpy()
    ids = pc.fill_null(column.flatten(), (1 << 32) - 1).to_numpy().astype(_TOKENS)
    return memoryview(ids.view(np.uint8)), np.concatenate(
        [np.zeros(1, np.int64), np.cumsum(lengths)]
    ) * _TOKENS.itemsize
