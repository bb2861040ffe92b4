"""What recipes mean in every unit, and what they did: for manifests, results and recipe files."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qscope_jax.sae.model import Sae
from qscope_jax.steering.recipe import UNITS, Steer, as_rows
from qscope_jax.steering.slots import resolve
from qscope_jax.steering.tap import Applied
from qscope_jax.steering.units import Scales, Stats, raw_strength, unit_of

AT = "output"  # of the hooked module: never its input, which is the layer before


def describe(
    recipes: Sequence[Steer] | Sequence[Sequence[Steer]],
    saes: Mapping[int, Sae],
    *,
    stats: Stats | None = None,
    applied: Applied | None = None,
) -> list[Any]:
    """The facts of every entry as plain values: a list of dicts for a shared recipe, else one such list per row.

    Each says layer, hook, feature (or the SHA-256 of a plain direction's float32 bytes), mode, positions, strength as
    given, |d_i| (`norm`), and the same strength in each of the units (None where it is not known). With `applied`, the
    totals of `count_applied`, also how many tokens were selected and changed: per row of the batch, or of this row.

    Raises:
      ValueError: see `steer`; or `applied` belongs to other recipes.
    """
    rows = as_rows(recipes)
    shared = not recipes or isinstance(recipes[0], Steer)
    resolved = iter(resolve([entry for row in rows for entry in row], saes, stats))
    found = [[_entry(entry, next(resolved)[1]) for entry in row] for row in rows]
    if applied is not None:
        _add_counts(found, applied, shared)
    return found[0] if shared else found


def _entry(entry: Steer, scales: Scales) -> dict[str, Any]:
    raw = raw_strength(entry, scales) if entry.strength is not None else None
    in_units: dict[str, float | None] = dict.fromkeys(UNITS)
    for units in UNITS:
        unit = unit_of(entry, units, scales)
        if raw is not None and unit and np.isfinite(unit) and (units == "raw" or entry.mode != "scale"):
            in_units[units] = raw / unit
    facts: dict[str, Any] = {"layer": entry.layer, "hook": entry.hook, "at": AT}
    if entry.feature is not None:
        facts["feature"] = entry.feature
    if entry.direction is not None:
        facts["direction"] = hashlib.sha256(np.asarray(entry.direction, "<f4").tobytes()).hexdigest()
    facts |= {"mode": entry.mode, "strength": entry.strength, "units": entry.units, "positions": entry.positions}
    return facts | {"preserve_norm": entry.preserve_norm, "norm": scales.norm, **in_units}


def _add_counts(found: list[list[dict[str, Any]]], applied: Applied, shared: bool) -> None:
    longest = max(map(len, found), default=0)
    expected = (applied.selected.shape[0] if shared else len(found), longest)
    if applied.selected.shape != expected:
        raise ValueError(f"applied has counts of shape {applied.selected.shape}; these recipes give {expected}")
    for name, counts in applied._asdict().items():
        for r, row in enumerate(found):
            for i, facts in enumerate(row):
                facts[name] = counts[:, i].tolist() if shared else int(counts[r, i])
