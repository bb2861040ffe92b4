"""One part of a run between batches and files: absorbs batches in any order, can be put aside and taken up again.

What a part becomes depends on its documents and the settings alone: each batch's result is kept by the batch's place in
the plan, and joined in the order of the documents at the end.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

from qscope_jax.data.batches import Batch, Segments, ranges
from qscope_jax.data.pooling import Pool, Rows, join_rows, merge_rows, pool_codes, rank_rows, take_rows
from qscope_jax.files.recognise import FormatError
from qscope_jax.files.tensors import open_tensors, write_tensors

VALUE_TYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4")}


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is kept of every code.

    `allowed` maps a layer's place to bool [d_sae]; None keeps all features.
    """

    per: Literal["document", "token"] = "document"
    pool: Pool = "max"
    top: int | None = None
    min_value: float = 0.0
    allowed: tuple[np.ndarray, ...] | None = None
    values: str = "float32"


class TokenCodes(NamedTuple):
    """Codes of tokens: idx [n, k] (uint16 where d_sae allows) and val [n, k], falling; unused: largest idx, val 0."""

    idx: np.ndarray
    val: np.ndarray


class Assembly:
    """The results of one part, batch by batch. `shapes` are (d_sae, k) of every layer."""

    def __init__(
        self,
        segments: Segments,
        plan: Sequence[Batch],
        documents: int,
        shapes: Sequence[tuple[int, int]],
        selection: Selection,
    ):
        self.segments, self.plan, self.documents = segments, plan, documents
        self._d_sae, self._k = [d_sae for d_sae, _ in shapes], [k for _, k in shapes]
        self._selection = selection
        self._results: dict[int, dict[str, np.ndarray]] = {}
        self._windowed = len(segments.document) > documents

    @property
    def missing(self) -> list[int]:
        """Places in the plan of the batches that are still to be absorbed."""
        return [i for i in range(len(self.plan)) if i not in self._results]

    def absorb(self, place: int, codes: Sequence[tuple[np.ndarray, np.ndarray]], counted: np.ndarray) -> None:
        """Takes the codes (values, indices), [b, t, k] per layer, of the batch at `place`.

        `counted` [layers, b, t] is False where a real token is masked as a sink; padding is left out here.
        """
        batch = self.plan[place]
        real, segment = self._fresh(batch)
        counts = counted.reshape(len(codes), -1)[:, real]
        result = {"masked": (~counts).sum(axis=1)}
        for i, (values, indices) in enumerate(codes):
            values, indices = (array.reshape(-1, array.shape[-1]) for array in (values, indices))
            if self._selection.per == "token":
                code = self._select_tokens(i, np.where(counts[i][:, None], values[real], 0), indices[real])
                result |= {f"{i}.idx": code.idx, f"{i}.val": code.val}
            else:
                kept, owner = real[counts[i]], segment[counts[i]]
                rows = self._pool(i, values[kept], indices[kept], owner, len(batch.segments))
                result |= {f"{i}.offsets": rows.offsets, f"{i}.features": rows.features, f"{i}.values": rows.values}
                result[f"{i}.counted"] = np.bincount(owner, minlength=len(batch.segments))
        self._results[place] = result

    @property
    def done(self) -> list[int]:
        """Places in the plan of the batches that were absorbed."""
        return sorted(self._results)

    @property
    def positions(self) -> int:
        """Positions computed for the whole part, padding included."""
        return sum(batch.size * batch.length for batch in self.plan)

    def masked(self) -> list[int]:
        """Tokens masked as sinks, per layer."""
        return np.sum(
            [np.zeros(len(self._d_sae), np.int64), *(r["masked"] for r in self._results.values())], 0
        ).tolist()

    def pooled(self, layer: int) -> Rows:
        """All documents' pooled features of the layer at place `layer`, in order, by falling value."""
        parts = [Rows(*(r[f"{layer}.{name}"] for name in Rows._fields)) for r in self._in_order()]
        rows = take_rows(join_rows(parts), self._row_order())
        if not self._windowed and self._selection.pool != "mean":
            return rows
        counted = np.concatenate([np.zeros(0, np.int64), *(r[f"{layer}.counted"] for r in self._in_order())])
        counted = np.bincount(self.segments.document, counted[self._row_order()], minlength=self.documents)
        if self._windowed:
            rows = merge_rows(rows, self.segments.document, self.documents, self._selection.pool)
        if self._selection.pool == "mean":
            rows = rows._replace(values=rows.values / np.repeat(counted, np.diff(rows.offsets)))
        return self._rank(layer, rows)

    def tokens(self, layer: int) -> TokenCodes:
        """All documents' token codes of the layer at place `layer`, in order."""
        fresh = (self.segments.lengths - self.segments.context)[self._planned()]
        ends = np.cumsum(fresh)
        order = self._row_order()
        take = ranges((ends - fresh)[order], ends[order])
        none = self._select_tokens(layer, np.zeros((0, self._k[layer])), np.zeros((0, self._k[layer]), np.int64))
        results = [none, *(TokenCodes(r[f"{layer}.idx"], r[f"{layer}.val"]) for r in self._in_order())]
        return TokenCodes(*(np.concatenate(column)[take] for column in zip(*results, strict=True)))

    def save(self, path: Path, fingerprint: str) -> None:
        """Puts the batches absorbed so far aside in one file."""
        arrays = {f"{place}/{name}": a for place, r in self._results.items() for name, a in r.items()}
        write_tensors(path, arrays, {"fingerprint": fingerprint})

    def restore(self, path: Path, fingerprint: str) -> None:
        """Takes up what `save` put aside.

        Raises:
          ValueError: the file is damaged, or belongs to another run.
        """
        file = open_tensors(path)
        if file.metadata.get("fingerprint") != fingerprint:
            raise FormatError(f"{path} belongs to another run than this one: remove it")
        for name in file.names:
            place, _, key = name.partition("/")
            self._results.setdefault(int(place), {})[key] = np.array(file.array(name))

    def _fresh(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Places in the flat batch of the real tokens that count here, and whose they are, by the batch's segments.

        Windows' context does not count, and for "last" only the documents' last tokens do.
        """
        begin = batch.begin + self.segments.context[batch.segments]
        end = batch.begin + self.segments.lengths[batch.segments]
        if self._selection.per == "document" and self._selection.pool == "last":
            begin = end - np.append(self.segments.document[1:] != self.segments.document[:-1], True)[batch.segments]
        return ranges(begin, end), np.repeat(np.arange(len(begin)), end - begin)

    def _pool(self, layer: int, values, indices, owner, count: int) -> Rows:
        rows = pool_codes(values, indices, owner, count, self._d_sae[layer], self._selection.pool)
        # Means and windows are ranked at the end, when the sums are whole.
        return rows if self._windowed or self._selection.pool == "mean" else self._rank(layer, rows)

    def _rank(self, layer: int, rows: Rows) -> Rows:
        chosen = self._selection
        allowed = None if chosen.allowed is None else chosen.allowed[layer]
        return rank_rows(rows, top=chosen.top, min_value=chosen.min_value, allowed=allowed)

    def _select_tokens(self, layer: int, values: np.ndarray, indices: np.ndarray) -> TokenCodes:
        chosen = self._selection
        values = np.where(values >= chosen.min_value, np.maximum(values, 0), 0)
        if chosen.allowed is not None:
            values = np.where(chosen.allowed[layer][indices], values, 0)
            order = np.argsort(-values, axis=1, kind="stable")
            values, indices = np.take_along_axis(values, order, 1), np.take_along_axis(indices, order, 1)
        kind = index_type(self._d_sae[layer])
        values, indices = values[:, : chosen.top], indices[:, : chosen.top]
        return TokenCodes(
            np.where(values > 0, indices, np.iinfo(kind).max).astype(kind), values.astype(VALUE_TYPES[chosen.values])
        )

    def _in_order(self) -> list[dict[str, np.ndarray]]:
        return [self._results[place] for place in range(len(self.plan))]

    def _planned(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(batch.segments for batch in self.plan)])

    def _row_order(self) -> np.ndarray:
        """Where each segment stands among the rows of all batches."""
        return np.argsort(self._planned(), kind="stable")


def index_type(d_sae: int) -> np.dtype:
    """The integer type that holds feature indices of a dictionary of this width."""
    return np.dtype("<u2" if d_sae <= 1 << 16 else "<u4")


def read_features(path: Path, shapes: Mapping[int, int]) -> dict[int, list[int]]:
    """Reads a list of features to keep: lines `FEATURE` (for every layer) or `LAYER FEATURE`; `#` starts a comment.

    `shapes` maps the layers of the run to d_sae.

    Raises:
      ValueError: a line that is neither, a layer not of this run, or a feature the SAE does not have; with its number.
    """
    chosen: dict[int, set[int]] = {layer: set() for layer in shapes}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) > 2 or not all(word.isdecimal() for word in words):
            raise ValueError(f"{path}:{number}: expected FEATURE or LAYER FEATURE, found {line!r}")
        feature = int(words[-1])
        for layer in shapes if len(words) == 1 else (int(words[0]),):
            if layer not in shapes:
                raise ValueError(
                    f"{path}:{number}: layer {layer} is not among the layers of this run, {sorted(shapes)}"
                )
            if feature >= shapes[layer]:
                raise ValueError(f"{path}:{number}: feature {feature} of layer {layer}, which has {shapes[layer]}")
            chosen[layer].add(feature)
    if not any(chosen.values()):
        raise ValueError(f"{path}: no feature in it")
    return {layer: sorted(features) for layer, features in chosen.items()}
