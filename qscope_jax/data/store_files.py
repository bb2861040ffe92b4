"""The files of a folder of features, and how they are written: each whole or not at all, each naming its run.

store.json                     what the folder holds; equal in every part, or the folder is refused
documents/part-00000.parquet   a row per document; written last: where it is, its part is done
tokens/acts-00000.safetensors  layer{n}.idx, layer{n}.val [n_tokens, k], tok [n_tokens], doc [n_documents + 1]
errors/part-00000.jsonl        the rows left out, joined as errors.jsonl at the end
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qscope_jax.data.assemble import TokenCodes
from qscope_jax.data.pooling import Rows
from qscope_jax.data.text import BadRow
from qscope_jax.files.atomic import atomic_path, write_json, write_text
from qscope_jax.files.tensors import write_tensors

FORMAT = "qscope-features-1"
METADATA = b"qscope"
_ROW_GROUP = 1024


def documents_path(folder: Path, part: int) -> Path:
    return folder / "documents" / f"part-{part:05d}.parquet"


def tokens_path(folder: Path, part: int) -> Path:
    return folder / "tokens" / f"acts-{part:05d}.safetensors"


def errors_path(folder: Path, part: int) -> Path:
    return folder / "errors" / f"part-{part:05d}.jsonl"


def partial_path(folder: Path, part: int) -> Path:
    """Where an interrupted run keeps the finished batches of a part."""
    return folder / "partial" / f"part-{part:05d}.safetensors"


def clear_leftovers(folder: Path, part: int) -> None:
    """Removes temporary files that a killed process left of a part which is now made again."""
    for target in (path(folder, part) for path in (documents_path, tokens_path, errors_path, partial_path)):
        for leftover in target.parent.glob(f".{target.name}.*.tmp"):
            leftover.unlink(missing_ok=True)


def fingerprint(info: Mapping[str, Any]) -> str:
    """SHA-256 of what `store.json` says."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def claim_folder(folder: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `store.json`, or checks that the one that is there says the same; returns what it says.

    Several processes may do this at once: one of them writes, all others compare. Keys that start with "measured" are
    taken from the folder.

    Raises:
      ValueError: the folder holds something else; every difference is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, mine = folder / "store.json", folder / f".store.{os.getpid()}.json"
    write_json(mine, {"kind": FORMAT, **info})
    try:
        os.link(mine, target)  # unlike a rename it fails where another process was first
    except FileExistsError:
        pass
    finally:
        mine.unlink()
    found = read_info(folder)
    wanted = json.loads(json.dumps({"kind": FORMAT, **info}))
    differences = [
        f"  {name}: the folder has {_short(a)}, this run {_short(b)}"
        for name, a, b in _differences(found, wanted, "")
        if not name.startswith("measured")
    ]
    if differences:
        raise ValueError(
            f"{folder} holds features of another run; choose another --out, or run with the same settings:\n"
            + "\n".join(differences)
        )
    return found


def read_info(folder: Path) -> dict[str, Any]:
    """What `store.json` says.

    Raises:
      FileNotFoundError: the folder is no folder of features.
      ValueError: the file is damaged or of another format.
    """
    path = folder / "store.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no store.json, so this is no folder that `qscope extract` wrote")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run the extraction again into a new folder") from None
    if not isinstance(info, dict) or info.get("kind") != FORMAT:
        raise ValueError(f"{path}: expected a JSON object of kind {FORMAT!r}; another version wrote this folder")
    return info


def document_table(
    ids: Sequence[str],
    kept: Mapping[str, Sequence[Any]],
    schema: pa.Schema,
    numbers: Mapping[str, np.ndarray],
    pooled: Mapping[int, Rows],
) -> pa.Table:
    """A row per document: `id`, carried columns, `numbers`, and lists `layer{n}_features`, `layer{n}_values` per layer.

    Raises:
      ValueError: more features than Arrow's 32-bit offsets count; smaller parts help.
    """
    columns: dict[str, pa.Array] = {"id": pa.array(ids, pa.string())}
    for field in schema:
        columns[field.name] = pa.array(kept[field.name], field.type)
    columns |= {name: pa.array(column) for name, column in numbers.items()}
    for layer, rows in pooled.items():
        if rows.offsets[-1] >= 1 << 31:
            raise ValueError(f"layer {layer}: {rows.offsets[-1]:,} features in one part; choose smaller --part-rows")
        offsets = pa.array(rows.offsets.astype(np.int32))
        for name, flat in (("features", rows.features), ("values", rows.values.astype(np.float32))):
            columns[f"layer{layer}_{name}"] = pa.ListArray.from_arrays(offsets, pa.array(flat))
    return pa.table(columns)


def write_documents(path: Path, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Writes a part's table; `facts` go into the file's own metadata. Equal input gives equal bytes."""
    table = table.replace_schema_metadata({METADATA: json.dumps(facts, sort_keys=True).encode()})
    lists = [name for name in table.column_names if name.endswith(("_features", "_values"))]
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=_ROW_GROUP,
            compression="zstd",
            compression_level=1,
            use_dictionary=[name for name in table.column_names if name not in lists],  # pyright: ignore[reportArgumentType]
            write_page_checksum=True,
        )


def read_facts(path: Path, expected: str) -> dict[str, Any]:
    """The facts of a part's table.

    Raises:
      ValueError: the file is damaged, or belongs to another run (`expected` is that run's fingerprint).
    """
    try:
        metadata = pq.read_metadata(path).metadata or {}
        facts = json.loads(metadata[METADATA])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or was not written by qscope ({error}): remove it and run again") from None
    if facts.get("fingerprint") != expected:
        raise ValueError(f"{path} belongs to another run than store.json: remove it and run again")
    return facts


def write_tokens(
    path: Path, tokens: np.ndarray, offsets: np.ndarray, codes: Mapping[int, TokenCodes], expected: str
) -> str:
    """Writes a part's token codes and returns the file's SHA-256."""
    arrays: dict[str, np.ndarray] = {"tok": tokens.astype("<u4"), "doc": offsets.astype("<i8")}
    for layer, code in codes.items():
        arrays |= {f"layer{layer}.idx": code.idx, f"layer{layer}.val": code.val}
    write_tensors(path, arrays, {"fingerprint": expected})
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_errors(path: Path, bad: Sequence[BadRow]) -> None:
    """Writes a line of JSON per row that was left out."""
    write_text(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in bad))


def join_errors(folder: Path, parts: int) -> None:
    """Joins the parts' errors as `errors.jsonl`, in the order of the rows."""
    with atomic_path(folder / "errors.jsonl") as temporary, open(temporary, "wb") as out:
        for part in range(parts):
            out.write(errors_path(folder, part).read_bytes())


def _differences(a: Any, b: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, a, b


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
