"""JSON as a configuration should be read: one object, no key twice, no NaN, of sane size, errors that name the file."""

import difflib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qscope_jax.files.recognise import FormatError

_MAX_BYTES = 16 << 20


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      FormatError: not JSON, not an object, a key twice, NaN or Infinity, or more than 16 MiB.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise FormatError(f"{path}: {size:,} bytes, expected a small JSON file of at most {_MAX_BYTES:,}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise FormatError(f"{path}: the key {twice[0]!r} comes twice; delete one")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise FormatError(f"{path}: {constant} is not JSON; write a number or null")

    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}; correct it or download it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object {{...}}, found a {type(value).__name__}")
    return value


def suggest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where something known is near, else the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
