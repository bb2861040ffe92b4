"""The steering table of lm-evaluation-harness (`--model steered`, a CSV), as it is meant.

Its `add` is ours in raw units. Its `clamp` sets the component along u = d/|d| of h - b_dec to v: our `project` to
v + b_dec.u. (Harness: one row per layer, and one `add` in all, are what it applies correctly: others are overwritten.)
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qscope_jax.files.atomic import write_text
from qscope_jax.files.recognise import FormatError
from qscope_jax.sae.model import Sae
from qscope_jax.steering.recipe import Steer, as_rows
from qscope_jax.steering.slots import check_layers, resolve
from qscope_jax.steering.units import Stats, raw_strength

COLUMNS = (
    "loader", "action", "sparse_model", "hookpoint", "feature_index", "steering_coefficient", "head_index", "sae_id",
    "description",
)  # fmt: skip
_NEEDED = ("hookpoint", "feature_index", "steering_coefficient")
_LAYER = re.compile(r"(?:model\.)?layers\.([0-9]{1,4})")


def read_lm_eval(path: str | Path, saes: Mapping[int, Sae]) -> list[Steer]:
    """The entries of a harness table, every row of it; `saes` must be those that its `sparse_model` names.

    Raises:
      FormatError: not such a table, or a row that is no residual stream's; the line is named.
      ValueError: `saes` lack the layer of a row.
    """
    path = Path(path)
    try:
        table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        rows = [(table.line_num, row) for row in table]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{path}: not a readable CSV ({error})") from None
    if missing := [name for name in _NEEDED if name not in (table.fieldnames or ())]:
        raise FormatError(f"{path}: the columns {', '.join(missing)} are missing; expected {','.join(COLUMNS)}")
    entries = []
    for line, row in rows:
        try:
            entries.append(_read_row(row))
        except ValueError as error:
            raise FormatError(f"{path}, line {line}: {error}") from None
    check_layers(entries, saes, max(saes, default=-1) + 1)
    as_rows(entries)
    return [_shifted(entry, saes, 1.0) if entry.mode == "project" else entry for entry in entries]


def write_lm_eval(
    path: str | Path, entries: Sequence[Steer], saes: Mapping[int, Sae], sparse_model: str, *,
    loader: str = "sparsify", stats: Stats | None = None,
) -> None:  # fmt: skip
    """Writes entries as a harness table.

    Args:
      path: of the CSV.
      entries: at most one per layer, and one `add` in all: of others the harness would apply the last alone.
      saes: {layer: Sae} of their layers.
      sparse_model: where the harness finds these SAEs: a repository of sparsify's form, or a release of SAELens.
      loader: "sparsify" or "sae_lens".
      stats: for units other than raw.

    Raises:
      ValueError: an entry that the harness cannot do: another mode, position rule, a direction, norm preservation.
    """
    (entries,) = as_rows(entries)
    if loader not in ("sparsify", "sae_lens"):
        raise ValueError(f"loader = {loader!r}; expected 'sparsify' or 'sae_lens'")
    for entry in entries:
        if entry.mode not in ("add", "project") or entry.feature is None or entry.direction is not None:
            raise ValueError(f"{entry}: the harness knows mode add and project (its clamp) of features alone")
        if entry.positions != "all" or entry.preserve_norm:
            raise ValueError(f"{entry}: the harness steers all positions and preserves no norm")
    layers, adds = [entry.layer for entry in entries], [entry for entry in entries if entry.mode == "add"]
    if len(set(layers)) < len(layers) or len(adds) > 1:
        raise ValueError("the harness would apply only the last entry of a layer, and only the last add of all")
    check_layers(entries, saes, max(saes, default=-1) + 1)
    scales = [found[1] for found in resolve(entries, saes, stats)]
    raw = [Steer(e.layer, e.feature, raw_strength(e, s), e.mode) for e, s in zip(entries, scales, strict=True)]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    for entry in raw:
        given = _shifted(entry, saes, -1.0) if entry.mode == "project" else entry
        table.writerow({
            "loader": loader, "action": "add" if entry.mode == "add" else "clamp", "sparse_model": sparse_model,
            "hookpoint": f"layers.{entry.layer}", "feature_index": entry.feature,
            "steering_coefficient": repr(given.strength),
            "sae_id": f"layer{entry.layer}" if loader == "sae_lens" else "",
        })  # fmt: skip
    write_text(path, text.getvalue())


def _read_row(row: dict[str, str | None]) -> Steer:
    if None in row or None in row.values():
        raise ValueError("more or fewer cells than columns")
    cells = {name: (value or "").strip() for name, value in row.items()}
    layer = _LAYER.fullmatch(cells["hookpoint"])
    if layer is None:
        raise ValueError(f"hookpoint = {cells['hookpoint']!r}; expected layers.N, the output of a decoder layer")
    if cells.get("head_index"):
        raise ValueError(f"head_index = {cells['head_index']!r}: steering of heads is not supported")
    modes = {"": "add", "add": "add", "clamp": "project"}
    if (action := cells.get("action", "")) not in modes:
        raise ValueError(f"action = {action!r}; expected add or clamp")
    if not re.fullmatch("[0-9]{1,9}", cells["feature_index"]):
        raise ValueError(f"feature_index = {cells['feature_index']!r}; expected a whole number, counted from 0")
    mode = "add" if modes[action] == "add" else "project"
    return Steer(int(layer[1]), int(cells["feature_index"]), float(cells["steering_coefficient"]), mode)


def _shifted(entry: Steer, saes: Mapping[int, Sae], sign: float) -> Steer:
    """The component of h for that of h - b_dec, or back."""
    ((direction, scales),) = resolve([entry], saes, None)
    bias = np.asarray(saes[entry.layer].params.b_dec, np.float64)
    assert entry.strength is not None  # a projection has one
    strength = entry.strength + sign * float(bias @ direction.astype(np.float64)) / scales.norm
    return Steer(entry.layer, entry.feature, strength, entry.mode)
