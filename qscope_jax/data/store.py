"""Reading features back: a folder that `qscope extract` wrote, as one store, by document and by feature.

Opening reads footers and headers; features are read part by part when asked for: memory does not grow with the store.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qscope_jax.data import store_files as files
from qscope_jax.data.assemble import VALUE_TYPES, TokenCodes, index_type
from qscope_jax.data.pooling import Rows
from qscope_jax.files.tensors import TensorFile, open_tensors

_REMEDY = "remove the part's file in documents/ and run the same extraction again"


class StoredDocument(NamedTuple):
    """One document; what the store does not hold is empty.

    `features` (stored per document): layer -> (features [n], values [n]) by falling value.
    `codes` (stored per token): layer -> idx and val [n_tokens, k], unused slots 0; `tokens` are the ids [n_tokens].
    """

    id: str
    n_tokens: int
    truncated: bool
    kept: dict[str, Any]
    features: dict[int, tuple[np.ndarray, np.ndarray]]
    tokens: np.ndarray
    codes: dict[int, TokenCodes]


class Hits(NamedTuple):
    """Where a feature fires: document (number in the store) and value [n]; per token also position and token id."""

    document: np.ndarray
    value: np.ndarray
    position: np.ndarray
    token: np.ndarray


class StorePart(NamedTuple):
    """One part of a store: documents `first` to `first + documents`, and its files."""

    number: int
    first: int
    documents: int
    tokens: int
    path: Path
    acts: Path | None


class FeatureStore:
    """A folder of features.

    Args:
      folder: what `qscope extract --out` named.
      partial: open a folder although some of its parts are not there yet.

    Raises:
      FileNotFoundError: no folder of features, or parts are missing.
      ValueError: a part is damaged or belongs to another run; the file is named.
    """

    def __init__(self, folder: str | os.PathLike[str], *, partial: bool = False):
        self.folder = Path(folder)
        self.info = files.read_info(self.folder)
        self._fingerprint = files.fingerprint(self.info)
        self.layers: tuple[int, ...] = tuple(self.info["layers"])
        self.per: str = self.info["per"]
        self.parts = self._open_parts(partial)

    def __len__(self) -> int:
        """Number of documents."""
        return sum(part.documents for part in self.parts)

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, as counted."""
        return sum(part.tokens for part in self.parts)

    def d_sae(self, layer: int) -> int:
        """Width of a layer's dictionary."""
        return int(self.info["shapes"][str(self._known(layer))]["d_sae"])

    def documents(self) -> pa.Table:
        """`id`, carried columns, `n_tokens` and `truncated` of every document, without features."""
        tables = [self._table(part, self._plain_columns()) for part in self.parts]
        return pa.concat_tables(tables).replace_schema_metadata(None) if tables else pa.table({})

    def find(self, id: str) -> int:
        """Number of the document called `id`.

        Raises:
          KeyError: no document has this id.
        """
        for part in self.parts:
            place = pc.index(self._table(part, ["id"]).column("id"), id).as_py()
            if place >= 0:
                return part.first + place
        raise KeyError(f"{self.folder}: no document is called {id!r}; rows left out are listed in errors.jsonl")

    def document(self, number: int) -> StoredDocument:
        """One document with everything stored of it, by number (see `find` for ids).

        Raises:
          IndexError: there is no such document.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"document {number}; the store has {len(self)}")
        part = next(part for part in self.parts if number < part.first + part.documents)
        row = number - part.first
        record = self._row(part, row)
        names = set(self._plain_columns()) - {"id", "n_tokens", "truncated"}
        kept = {name: record[name] for name in record if name in names}
        features, codes, tokens = {}, {}, np.zeros(0, np.uint32)
        if part.acts is None:
            for layer in self.layers:
                indices, values = record[f"layer{layer}_features"], record[f"layer{layer}_values"]
                features[layer] = (np.array(indices, np.uint32), np.array(values, np.float32))
        else:
            acts = self._acts(part)
            begin, end = acts.array("doc")[row : row + 2].tolist()
            tokens = np.array(acts.array("tok")[begin:end])
            codes = {layer: _widened(acts, layer, slice(begin, end)) for layer in self.layers}
        return StoredDocument(record["id"], record["n_tokens"], record["truncated"], kept, features, tokens, codes)

    def rows(self, layer: int) -> Iterator[tuple[StorePart, Rows]]:
        """The pooled features of one layer, part by part, as sparse rows.

        Raises:
          ValueError: the store holds codes per token; see `token_codes`.
        """
        self._known(layer)
        if self.per != "document":
            raise ValueError(f"{self.folder} holds codes per token, no pooled features: use token_codes")
        for part in self.parts:
            table = self._table(part, [f"layer{layer}_features", f"layer{layer}_values"]).combine_chunks()
            features, values = (_list_column(table.column(i)) for i in range(2))
            offsets = features.offsets.to_numpy().astype(np.int64)
            yield part, Rows(offsets, features.values.to_numpy(), values.values.to_numpy())

    def token_codes(self, layer: int) -> Iterator[tuple[StorePart, np.ndarray, np.ndarray, TokenCodes]]:
        """Part by part: document offsets [documents + 1], token ids [n] and codes [n, k], as mapped views.

        Raises:
          ValueError: the store holds pooled features; see `rows`.
        """
        self._known(layer)
        for part in self.parts:
            if part.acts is None:
                raise ValueError(f"{self.folder} holds pooled features, no codes per token: use rows")
            acts = self._acts(part)
            code = TokenCodes(acts.array(f"layer{layer}.idx"), acts.array(f"layer{layer}.val"))
            yield part, acts.array("doc"), acts.array("tok"), code

    def feature(self, layer: int, feature: int) -> Hits:
        """Every place where a feature of a layer fires, in the order of documents and tokens.

        Raises:
          ValueError: a layer or feature that the store does not have.
        """
        if not 0 <= feature < self.d_sae(layer):
            raise ValueError(f"feature {feature}; layer {layer} has {self.d_sae(layer)}")
        none = np.zeros(0, np.int64)
        hits = [Hits(none, np.zeros(0, np.float32), none, np.zeros(0, np.uint32))]
        if self.per == "document":
            for part, rows in self.rows(layer):
                place = np.flatnonzero(rows.features == feature)
                document = np.searchsorted(rows.offsets, place, side="right") - 1 + part.first
                hits.append(Hits(document, rows.values[place], none, hits[0].token))
        else:
            for part, offsets, tokens, code in self.token_codes(layer):
                row, slot = np.nonzero((code.idx == feature) & (code.val > 0))
                local = np.searchsorted(offsets, row, side="right") - 1
                value = code.val[row, slot].astype(np.float32)
                hits.append(Hits(local + part.first, value, row - offsets[local], tokens[row]))
        return Hits(*(np.concatenate(column) for column in zip(*hits, strict=True)))

    def firing(self, layer: int) -> np.ndarray:
        """int64 [d_sae]: in how many documents (or tokens, where stored per token) each feature fires.

        Raises:
          ValueError: a layer that the store does not have, or a feature beyond its SAE's width.
        """
        total = np.zeros(self.d_sae(layer), np.int64)
        if self.per == "document":
            fired = ((part, rows.features) for part, rows in self.rows(layer))
        else:
            fired = ((part, code.idx[code.val > 0]) for part, _, _, code in self.token_codes(layer))
        for part, features in fired:
            if features.max(initial=0) >= len(total):
                raise ValueError(f"{part.acts or part.path}: feature {features.max()} of {len(total)}; {_REMEDY}")
            total += np.bincount(features, minlength=len(total))
        return total

    def verify(self) -> None:
        """Reads every byte and compares checksums; opening alone finds only damage of structure.

        Raises:
          ValueError: the first damaged file.
        """
        for part in self.parts:
            self._table(part, None)
            if part.acts is not None:
                with open(part.acts, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != files.read_facts(part.path, self._fingerprint)["acts_sha256"]:
                    raise ValueError(f"{part.acts} is damaged: its bytes are not those that were written; {_REMEDY}")

    def _open_parts(self, partial: bool) -> list[StorePart]:
        parts, first, missing = [], 0, []
        for number in range(self.info["parts"]):
            path = files.documents_path(self.folder, number)
            if not path.exists():
                missing.append(number)
                continue
            facts = files.read_facts(path, self._fingerprint)
            acts = files.tokens_path(self.folder, number) if self.per == "token" else None
            parts.append(StorePart(number, first, facts["documents"], facts["tokens"], path, acts))
            if acts is not None:
                self._check_acts(parts[-1])
            first += facts["documents"]
        if missing and not partial:
            raise FileNotFoundError(
                f"{self.folder}: {len(missing)} of {self.info['parts']} parts are missing, the first is {missing[0]}; "
                "run the same command again to make them, or open with partial=True"
            )
        return parts

    def _check_acts(self, part: StorePart) -> None:
        acts = self._acts(part)
        if acts.metadata.get("fingerprint") != self._fingerprint:
            raise ValueError(f"{part.acts} belongs to another run than store.json; {_REMEDY}")
        wanted = {"tok": (np.dtype("<u4"), (part.tokens,)), "doc": (np.dtype("<i8"), (part.documents + 1,))}
        for layer in self.layers:
            k = min(self.info["shapes"][str(layer)]["k"], self.info["top"] or 1 << 30)
            wanted[f"layer{layer}.idx"] = (index_type(self.d_sae(layer)), (part.tokens, k))
            wanted[f"layer{layer}.val"] = (VALUE_TYPES[self.info["values"]], (part.tokens, k))
        for name, expected in wanted.items():
            found = acts.info(name)
            if (found.dtype, found.shape) != expected:
                raise ValueError(f"{part.acts}: {name} is {found.dtype} {found.shape}; expected {expected}; {_REMEDY}")

    def _acts(self, part: StorePart) -> TensorFile:
        assert part.acts is not None
        if not part.acts.exists():
            raise FileNotFoundError(f"{part.acts} is missing; {_REMEDY}")
        return _opened(part.acts, part.acts.stat().st_mtime_ns)

    def _plain_columns(self) -> list[str]:
        return ["id", *self.info["keep"], "n_tokens", "truncated"]

    def _table(self, part: StorePart, columns: list[str] | None) -> pa.Table:
        with _explained(part.path):
            return pq.ParquetFile(part.path, page_checksum_verification=True).read(columns=columns)

    def _row(self, part: StorePart, row: int) -> dict[str, Any]:
        with _explained(part.path):
            file = pq.ParquetFile(part.path, page_checksum_verification=True)
            group = 0
            while row >= (size := file.metadata.row_group(group).num_rows):
                row, group = row - size, group + 1
            return file.read_row_group(group).slice(row, 1).to_pylist()[0]

    def _known(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer {layer}; {self.folder} holds the layers {', '.join(map(str, self.layers))}")
        return layer


@functools.lru_cache(maxsize=64)
def _opened(path: Path, _modified: int) -> TensorFile:
    return open_tensors(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_REMEDY}") from None


def _list_column(column: pa.ChunkedArray) -> pa.ListArray:
    chunk = column.combine_chunks()
    return chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk


def _widened(acts: TensorFile, layer: int, rows: slice) -> TokenCodes:
    """Codes as int64 and float32; unused slots as 0, 0."""
    idx, val = acts.array(f"layer{layer}.idx")[rows], acts.array(f"layer{layer}.val")[rows].astype(np.float32)
    return TokenCodes(np.where(val > 0, idx, 0).astype(np.int64), val)
