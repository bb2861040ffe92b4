"""Recipes as TOML or JSON files, bound by SHA-256 to the model and to the SAE of every layer whose features they name.

Entries stand under `steer`, with the fields of `Steer`; `measured` says the strength in all units and is not read.
A plain direction is the name of a tensor in a safetensors file beside the recipe.
"""

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qscope_jax.backbone.config_reader import unique_keys
from qscope_jax.files.atomic import write_text
from qscope_jax.files.recognise import FormatError
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.sae.model import Sae
from qscope_jax.steering.facts import AT, describe
from qscope_jax.steering.recipe import Steer, as_rows
from qscope_jax.steering.units import Stats

FORMAT = "qscope-recipe-1"
_FIELDS = tuple(field.name for field in dataclasses.fields(Steer))
_EMPTY = "there are no entries under `steer`: an empty recipe would leave everything unsteered"
_HEAD = "# Applied is what `strength` and `units` say; `measured` is the same strength in other units, for readers.\n"


class Bound(NamedTuple):
    """What a recipe belongs to: SHA-256 of the model's files together, and of the file and the k of every layer's SAE.

    Names are for people: hashes and k decide, since with another k other features are active.
    """

    model: str
    saes: Mapping[int, str]
    k: Mapping[int, int]
    model_name: str = ""
    sae_name: str = ""


def combine_hashes(files: Mapping[str, str]) -> str:
    """One SHA-256 for several files {name: SHA-256}: that of the lines which `sha256sum` prints for them, by name."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def save_recipe(
    path: str | Path, entries: Sequence[Steer], saes: Mapping[int, Sae], bound: Bound, *, stats: Stats | None = None
) -> Path:
    """Writes entries to a .toml or .json file, whole or not at all; directions go to a file beside it, before.

    Raises:
      ValueError: another ending; no entries; `bound` lacks the SAE of a feature's layer, or says another k than the SAE
        itself; or see `describe`.
    """
    path = Path(path)
    (entries,) = as_rows(entries)
    if not entries:
        raise ValueError(f"{path}: {_EMPTY}")
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: a recipe's name ends in {' or '.join(_WRITERS)}")
    layers = sorted({entry.layer for entry in entries if entry.feature is not None})
    if missing := [layer for layer in layers if layer not in bound.saes]:
        raise ValueError(f"{path}: no hash was given for the SAEs of layers {missing}; a recipe is bound to them")
    facts = describe(entries, saes, stats=stats)
    for n in layers:
        if saes[n].config.k != bound.k.get(n):
            raise ValueError(f"{path}: the SAE of layer {n} has k = {saes[n].config.k}, `bound` says {bound.k.get(n)}")
    content: dict[str, Any] = {"format": FORMAT, "model": {"name": bound.model_name, "sha256": bound.model}}
    content["sae"] = [
        {"layer": n, "name": bound.sae_name, "sha256": bound.saes[n], "k": saes[n].config.k} for n in layers
    ]
    vectors = {f"direction{i}": entry.direction for i, entry in enumerate(entries) if entry.direction is not None}
    if vectors:
        beside = path.with_name(f"{path.stem}.directions.safetensors")
        write_tensors(beside, vectors)
        content["directions"] = {"file": beside.name, "sha256": _hash(beside)}
    content["steer"] = [_as_table(i, entry, facts[i]) for i, entry in enumerate(entries)]
    write_text(path, _WRITERS[path.suffix](content))
    return path


def load_recipe(path: str | Path, bind: Callable[[tuple[int, ...]], Bound]) -> list[Steer]:
    """Reads a recipe and holds its hashes against those that are found.

    Args:
      path: a .toml or .json file.
      bind: gives the hashes of the model at hand, and hashes and k of its SAEs at the layers asked for; see
        `qscope_jax.jobs.places`.

    Raises:
      FormatError: the file cannot be read, is empty, says what no recipe says, or belongs to another model, SAE, k or
        layer. Files of before k was written are read without.
    """
    path = Path(path)
    content = _read(path)
    try:
        _check_keys("", content, {"format", "model", "sae", "directions", "steer"})
        if content.get("format") != FORMAT:
            raise ValueError(f"format = {content.get('format')!r}, expected {FORMAT!r}")
        vectors = _read_directions(path, content.get("directions"))
        entries = [_from_table(f"steer[{i}]: ", table, vectors) for i, table in _tables(content, "steer")]
        as_rows(entries)
        _check_bound(content, entries, bind(tuple(sorted({e.layer for e in entries if e.feature is not None}))))
        if not entries:
            raise ValueError(_EMPTY)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: {error}") from None
    return entries


def _check_bound(content: dict[str, Any], entries: list[Steer], found: Bound) -> None:
    """Refuses hashes and k that differ, and features of layers to which no SAE was bound."""
    model = content.get("model") or {}
    _check_keys("model: ", model, {"name", "sha256"})
    _same("model", model, found.model, found.model_name)
    bound: dict[int, dict[str, Any]] = {}
    for i, table in _tables(content, "sae"):
        _check_keys(f"sae[{i}]: ", table, {"layer", "name", "sha256", "k"})
        if not isinstance(layer := table.get("layer"), int) or layer in bound:
            raise ValueError(f"sae[{i}]: layer = {layer!r}; expected a number that no other has")
        bound[layer] = table
    for layer in sorted({entry.layer for entry in entries if entry.feature is not None}):
        table = bound.get(layer, {})
        _same(f"SAE of layer {layer}", table, found.saes[layer], found.sae_name)
        if (k := table.get("k", found.k[layer])) != found.k[layer] or isinstance(k, bool):
            raise ValueError(
                f"it was made with k = {k!r} of the SAE of layer {layer}, the one at hand is used with k = "
                f"{found.k[layer]}: other features would be active"
            )


def _same(what: str, table: dict[str, Any], found: str, name: str) -> None:
    wanted = table.get("sha256")
    if wanted == found:
        return
    at_hand = f"the one at hand{f' ({name})' if name else ''} has sha256 {found}"
    if wanted is None:
        raise ValueError(f"it is bound to no {what}, as every recipe must be; {at_hand}")
    made_for = f" ({table['name']})" if table.get("name") else ""
    raise ValueError(f"it was made for another {what}{made_for}, with sha256 {wanted}; {at_hand}")


def _as_table(index: int, entry: Steer, facts: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {"hook": entry.hook, "at": AT}
    table |= {name: value for name in _FIELDS if (value := getattr(entry, name)) is not None}
    if entry.direction is not None:
        table["direction"] = f"direction{index}"
    measured = {name: facts[name] for name in ("raw", "xmax", "xnorm", "norm")}
    return table | {"measured": {name: value for name, value in measured.items() if value is not None}}


def _from_table(where: str, table: dict[str, Any], vectors: Mapping[str, Any]) -> Steer:
    _check_keys(where, table, {*_FIELDS, "hook", "at", "measured"})
    fields = {name: value for name, value in table.items() if name in _FIELDS}
    if (name := fields.get("direction")) is not None:
        if name not in vectors:
            raise ValueError(f"{where}direction = {name!r}; the directions are {sorted(vectors)}")
        fields["direction"] = vectors[name]
    try:
        entry = Steer(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}{error}") from None
    hook = f"{AT} of {entry.hook}"
    if (said := f"{table.get('at', AT)} of {table.get('hook', entry.hook)}") != hook:
        raise ValueError(f"{where}the hook is the {said}; layer {entry.layer} means the {hook}")
    return entry


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a readable recipe ({error}); expected TOML in .toml, JSON in .json") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected a table of {FORMAT!r}, found {type(content).__name__}")
    return content


def _read_directions(path: Path, table: Any) -> dict[str, Any]:
    if table is None:
        return {}
    _check_keys("directions: ", table, {"file", "sha256"})
    name = table.get("file")
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"directions: file = {name!r}; expected the name of a file beside the recipe")
    beside = path.with_name(name)
    if (found := _hash(beside)) != table.get("sha256"):
        raise ValueError(f"directions: {name} has sha256 {found}, the recipe was made with {table.get('sha256')}")
    file = open_tensors(beside)
    return {name: file.array(name) for name in file.names}


def _tables(content: dict[str, Any], name: str) -> list[tuple[int, dict[str, Any]]]:
    tables = content.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{name} must be a list of tables")
    return list(enumerate(tables))


def _check_keys(where: str, table: Any, known: set[str]) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"{where}expected a table, found {table!r}")
    if unknown := sorted(set(table) - known):
        raise ValueError(f"{where}unknown {', '.join(unknown)}; expected {', '.join(sorted(known))}")


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _toml(content: dict[str, Any]) -> str:
    """The one shape of a recipe, which `tomllib` reads back."""
    lines = [_HEAD + f"format = {_value(content['format'])}"]
    for name, part in content.items():
        for table in part if isinstance(part, list) else [part] if isinstance(part, dict) else []:
            lines += ["", f"[[{name}]]" if isinstance(part, list) else f"[{name}]"]
            lines += [f"{key} = {_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {".toml": _toml, ".json": _json}
