"""results.jsonl while it grows: batches are appended, what a crash left half written is dropped; sorted at the end."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qscope_jax.files.atomic import write_text

Row = dict[str, Any]


def take_up(path: Path, batches: Sequence[Sequence[int]]) -> set[int]:
    """The batches (by place) that are in the file; rows of others, and a last line without an end, are dropped.

    Raises:
      ValueError: a line that is no row of these batches.
    """
    if not path.exists():
        return set()
    *lines, rest = path.read_bytes().split(b"\n")
    rows: dict[int, bytes] = {}
    known = {number for batch in batches for number in batch}
    for place, line in enumerate(lines, 1):
        number = _number(line)
        if number not in known or number in rows:
            raise ValueError(f"{path}:{place}: no row of this run; move the file away, or choose another --out")
        rows[number] = line
    done = {place for place, batch in enumerate(batches) if all(number in rows for number in batch)}
    kept = [number for place in sorted(done) for number in batches[place]]
    if rest or len(kept) < len(rows):
        write_text(path, "".join(rows[number].decode() + "\n" for number in kept))
    return done


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds the rows of a batch; they are on the disk when this returns."""
    with open(path, "ab") as file:
        file.write("".join(dump(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def sort(path: Path) -> None:
    """Brings the rows into the order of the prompts."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    write_text(path, "".join(line + "\n" for line in sorted(lines, key=lambda line: json.loads(line)["number"])))


def dump(row: Mapping[str, Any]) -> str:
    """One line of JSON; text that is none (half a surrogate pair) cannot occur, NaN is refused."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _number(line: bytes) -> int | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row.get("number") if isinstance(row, dict) else None
