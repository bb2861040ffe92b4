"""A corpus: many files as one numbered sequence of rows, every row a document or a reported error.

Row numbers count through all files in order, good rows and bad, so they name a row for good: `number` over the corpus,
`line` (from 1) in its file. What a row becomes depends on the corpus alone, never on who reads which part of it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from qscope_jax.data.inputs import Format, find_files
from qscope_jax.data.rows import ParquetRows, RawRow, RowFile, Unreadable, open_rows

_SCHEMA_ROWS = 1000  # rows looked at to find the types of carried columns
_STEP = 4096


@dataclasses.dataclass(frozen=True)
class Fields:
    """Which columns to read."""

    text: str = "text"
    """The column that holds the document."""
    id: str | None = None
    """The column that names the document; by default its name is `file:line`."""
    keep: tuple[str, ...] = ()
    """Columns carried into the results."""

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.text, *self.keep, *(() if self.id is None else (self.id,)))))


class Document(NamedTuple):
    """A good row."""

    number: int
    id: str
    text: str
    kept: tuple[Any, ...]


class BadRow(NamedTuple):
    """A row that is left out, and why; a line of `errors.jsonl`."""

    number: int
    id: str
    file: str
    line: int
    reason: str


class Corpus:
    """The rows of many files, made by `open_corpus`; safe to read from several threads."""

    def __init__(self, files: Sequence[RowFile], fields: Fields):
        self.files, self.fields = files, fields
        self.starts = np.cumsum([0, *(len(file) for file in files)])
        self._duplicates: dict[int, str] = {}
        for name, option in ((fields.text, "--text-field"), (fields.id, "--id-field")):
            self._check_column(name, option)
        self.schema = pa.schema([(name, self._kept_type(name)) for name in fields.keep])
        if fields.id is not None:
            self._duplicates = self._find_duplicates()

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bytes(self) -> int:
        """Size of all rows."""
        return int(sum(file.sizes().sum() for file in self.files))

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, rows and SHA-256 of every file: equal fingerprints mean equal rows."""
        return [{"name": file.file.name, "rows": len(file), "sha256": file.digest} for file in self.files]

    def parts(self, *, rows: int, size: int) -> list[tuple[int, int]]:
        """Cuts the corpus into ranges of at most `rows` rows and about `size` bytes; the same for every reader."""
        sizes = np.concatenate([np.zeros(0, np.int64), *(file.sizes() for file in self.files)])
        total = np.cumsum(sizes)
        parts, start = [], 0
        while start < len(self):
            before = total[start - 1] if start else 0
            by_size = int(np.searchsorted(total, before + size, side="right"))
            stop = min(start + rows, max(by_size, start + 1), len(self))
            parts.append((start, stop))
            start = stop
        return parts

    def read(self, start: int, stop: int) -> tuple[list[Document], list[BadRow]]:
        """The documents and the bad rows among the rows start <= number < stop, each in order."""
        documents, bad = [], []
        for number, file, line, raw in self._raw(start, stop):
            row = self._row(number, f"{file}:{line}", raw)
            if isinstance(row, Document):
                documents.append(row)
            else:
                bad.append(BadRow(number, row[0], file, line, row[1][:500]))
        return documents, bad

    def place(self, number: int) -> tuple[str, int]:
        """File and line (from 1) of a row."""
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.files[which].file.name, number - int(self.starts[which]) + 1

    def _raw(self, start: int, stop: int) -> Iterable[tuple[int, str, int, RawRow]]:
        while start < stop:
            which = int(np.searchsorted(self.starts, start, side="right")) - 1
            file, first = self.files[which], int(self.starts[which])
            end = int(min(self.starts[which + 1], stop))
            for i, raw in enumerate(file.read(start - first, end - first), start=start - first):
                yield first + i, file.file.name, i + 1, raw
            start = end

    def _row(self, number: int, place: str, raw: RawRow) -> Document | tuple[str, str]:
        """The document, or (id, reason)."""
        if raw.record is None:
            return place, raw.error or "no record"
        identity, fault = (place, None) if self.fields.id is None else _identity(raw.record, self.fields.id)
        if fault is None and number in self._duplicates:
            fault = f"id {identity!r} is already the id of {self._duplicates[number]}"
        fault = fault or _text_fault(raw.record, self.fields.text)
        if fault is not None:
            return identity or place, fault
        kept = []
        for field in self.schema:
            value = _plain(raw.record.get(field.name), field.type)
            if (fault := _misfit(value, field)) is not None:
                return identity, fault
            kept.append(value)
        return Document(number, identity, raw.record[self.fields.text], tuple(kept))

    def _kept_type(self, name: str) -> pa.DataType:
        """The type of a carried column: a parquet file's own, else that of the first rows' JSON values."""
        for file in self.files:
            if isinstance(file, ParquetRows) and name in file.schema.names:
                found = file.schema.field(name).type
                return found.value_type if pa.types.is_dictionary(found) else found
        rows = self._raw(0, min(_SCHEMA_ROWS, len(self)))
        values = [raw.record[name] for *_, raw in rows if raw.record and raw.record.get(name) is not None]
        self._check_column(name, "--keep")
        return _json_type(values)

    def _check_column(self, name: str | None, option: str) -> None:
        """Refuses a column that readable rows do not have: more likely a wrong name than a corpus of bad rows."""
        rows = self._raw(0, min(_SCHEMA_ROWS, len(self)))
        records = [raw.record for *_, raw in rows if raw.record is not None]
        if name is not None and records and not any(name in record for record in records):
            has = ", ".join(sorted({key for record in records[:10] for key in record})) or "none of those asked for"
            raise ValueError(
                f"no row among the first {_SCHEMA_ROWS} holds the column {name!r} of {option}; of those asked for, "
                f"rows hold: {has}"
            )

    def _find_duplicates(self) -> dict[int, str]:
        """Rows whose id an earlier row has, by number, with the place of the first; one pass, 8 bytes per row."""
        hashes = np.zeros(len(self), np.uint64)
        known = np.zeros(len(self), bool)
        for number, identity, _ in self._identities(range(0, len(self), _STEP)):
            digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
            hashes[number], known[number] = int.from_bytes(digest, "little"), True
        values, counts = np.unique(hashes[known], return_counts=True)
        suspects = np.flatnonzero(known & np.isin(hashes, values[counts > 1]))
        first: dict[str, str] = {}
        duplicates = {}
        for number, identity, place in self._identities(suspects, step=1):
            if identity in first:
                duplicates[number] = first[identity]
            first.setdefault(identity, place)
        return duplicates

    def _identities(self, starts: Iterable[int], step: int = _STEP) -> Iterable[tuple[int, str, str]]:
        for start in starts:
            for number, file, line, raw in self._raw(int(start), min(int(start) + step, len(self))):
                identity, fault = _identity(raw.record or {}, str(self.fields.id))
                if fault is None:
                    yield number, identity, f"{file}:{line}"


def open_corpus(
    specs: Iterable[str],
    fields: Fields | None = None,
    *,
    format: Format | None = None,
    document: Literal["line", "file"] = "line",
    max_row_bytes: int = 16 << 20,
    say: Callable[[str], None] | None = None,
) -> Corpus:
    """Opens files, folders, globs or remote addresses as one corpus. Every file is scanned once, for lines and hash.

    Args:
      specs: what to read; see `find_files`.
      fields: which columns hold the text, the id and what is carried through.
      format: "jsonl", "parquet" or "text" where the endings do not say it.
      document: whether a line or a whole file of plain text is one document.
      max_row_bytes: longer rows of JSONL and text are errors; they are never read into memory.
      say: told what takes time.

    Raises:
      FileNotFoundError: a name matches nothing.
      ValueError: a file that cannot be read at all, or a carried column that no row has.
    """
    fields = fields or Fields()
    files = find_files(specs, format=format)
    if say:
        say(f"reading {len(files)} file(s) of {sum(file.path.stat().st_size for file in files) / 1e6:,.1f} MB")
    whole = document == "file"
    return Corpus([open_rows(f, fields.all, whole=whole, max_bytes=max_row_bytes) for f in files], fields)


def _identity(record: dict[str, Any], name: str) -> tuple[str, str | None]:
    """The id as text, and what is wrong with it."""
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 1 << 63:
            return "", f"field {name!r} holds an integer beyond 64 bits"
        return str(value), None
    if fault := _string_fault(value, name, name in record):
        return "", fault
    return str(value), None if value else f"field {name!r} is empty"


def _text_fault(record: dict[str, Any], name: str) -> str | None:
    value = record.get(name)
    if fault := _string_fault(value, name, name in record):
        return fault
    if not value:
        return f"field {name!r} is empty"
    if value.isspace():
        return f"field {name!r} holds only whitespace"
    return f"field {name!r} holds a NUL character" if "\0" in value else None


def _string_fault(value: Any, name: str, present: bool) -> str | None:
    if not present:
        return f"field {name!r} is missing"
    if isinstance(value, Unreadable):
        return f"field {name!r} is {value}"
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        return f"field {name!r} holds {found}; expected a text"
    return f"field {name!r} holds half a surrogate pair, which is no text" if _has_surrogate(value) else None


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _json_type(values: list[Any]) -> pa.DataType:
    """The type of most values: one odd value is an error of its row, never of all the others."""
    numbers = [value for value in values if type(value) in (int, float)]
    if 2 * len(numbers) > len(values):
        return pa.float64() if any(type(value) is float for value in numbers) else pa.int64()
    flags = sum(type(value) is bool for value in values)
    return pa.bool_() if 2 * flags > len(values) else pa.string()


def _plain(value: Any, kind: pa.DataType) -> Any:
    """JSON objects and lists are carried as JSON text."""
    nested = isinstance(value, dict | list) and pa.types.is_string(kind)
    return json.dumps(value, ensure_ascii=False) if nested else value


def _misfit(value: Any, field: pa.Field) -> str | None:
    """Why a value cannot stand in a carried column, or None. Arrow itself would cut 1.5 to 1."""
    kind = type(value).__name__
    if value is None or (isinstance(value, str) and pa.types.is_string(field.type)):
        fault = None if value is None else _string_fault(value, field.name, True)
        return fault
    if isinstance(value, Unreadable):
        return f"field {field.name!r} is {value}"
    if isinstance(value, float) and pa.types.is_integer(field.type):
        return f"field {field.name!r} holds {value!r}; earlier rows hold integers"
    try:
        pa.scalar(value, type=field.type)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        return f"field {field.name!r} holds a {kind} that is no {field.type} as in earlier rows ({error})"
    return None
