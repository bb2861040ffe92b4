"""Recipes laid out for a device: every row of a batch has slots, every slot one entry as numbers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.mesh import to_host
from qscope_jax.sae.model import Sae
from qscope_jax.steering.positions import parse_positions
from qscope_jax.steering.recipe import MODES, Steer
from qscope_jax.steering.units import Scales, Stats, raw_strength, scales_of

_RANGES = 8  # of positions per entry; more only where one is asked for


class Entries(NamedTuple):
    """Recipes in slots: r = 1 row for all, or one for each row of the batch; e = the entries of the longest row.

    Slots stand in the order of `Steer.key`, whatever order was given, so that sums are taken in the same order.

    Attributes:
      layer: -1 where a slot is not used.
      mode: index into `MODES`.
      direction: the decoder row as stored, or the plain direction; of unit length for "project".
      feature: -1 for a plain direction.
      strength: raw.
      ranges: (low, high, whether they count from the prompt's end), half-open, `n` of them; the unused are empty.
      preserve: whether tokens keep their norm.
      slot: where the entry that was given i-th stands.
    """

    layer: Int[Array, "r e"]
    mode: Int[Array, "r e"]
    direction: Float[Array, "r e d"]
    feature: Int[Array, "r e"]
    strength: Float[Array, "r e"]
    ranges: Int[Array, "r e n 3"]
    preserve: Bool[Array, "r e"]
    slot: Int[Array, "r e"]


def check_layers(entries: Sequence[Steer], saes: Mapping[int, Sae], depth: int) -> None:
    """Refuses layers that the model or `saes` do not have, and SAEs that stand at another layer than their own.

    Raises:
      ValueError: the layer, and which there are.
    """
    for layer, sae in saes.items():
        if sae.config.layer is not None and sae.config.layer != layer:
            raise ValueError(f"saes[{layer}] is the SAE of layer {sae.config.layer}")
    for entry in entries:
        if entry.feature is not None and entry.layer not in saes:
            raise ValueError(f"feature {entry.feature} of layer {entry.layer}: saes has the layers {sorted(saes)}")
        if entry.layer >= depth:
            raise ValueError(f"layer {entry.layer}, but the layers are 0..{depth - 1}; or give num_layers of the model")


def resolve(entries: Sequence[Steer], saes: Mapping[int, Sae], stats: Stats | None) -> list[tuple[np.ndarray, Scales]]:
    """The direction [d] of every entry, float32 and as stored, and what its units are multiples of.

    Raises:
      ValueError: a feature out of range, a direction of zero, or widths that differ.
    """
    directions = _directions(entries, saes)
    found = []
    for entry, direction in zip(entries, directions, strict=True):
        if direction.shape != directions[0].shape:
            raise ValueError(
                f"directions of {directions[0].size} and of {direction.size}: they are of different models"
            )
        norm = float(np.linalg.norm(direction.astype(np.float64)))
        if not 0 < norm < np.inf:
            raise ValueError(f"layer {entry.layer}, feature {entry.feature}: its direction has the norm {norm}")
        found.append((direction, scales_of(entry, norm, saes.get(entry.layer), stats)))
    return found


def _directions(entries: Sequence[Steer], saes: Mapping[int, Sae]) -> list[np.ndarray]:
    wanted: dict[int, list[int]] = {}
    for entry in entries:
        if entry.feature is None:
            continue
        if entry.feature >= (count := saes[entry.layer].config.d_sae):
            raise ValueError(f"feature {entry.feature} of layer {entry.layer}: its SAE has the features 0..{count - 1}")
        wanted.setdefault(entry.layer, []).append(entry.feature)
    rows = {}
    for layer, features in wanted.items():
        found = to_host(jnp.take(saes[layer].params.w_dec, jnp.asarray(features), axis=0)).astype(np.float32)
        rows.update({(layer, feature): row for feature, row in zip(features, found, strict=True)})
    return [rows[entry.layer, entry.feature] if entry.direction is None else entry.direction for entry in entries]


def fill_slots(rows: list[list[Steer]], resolved: list[tuple[np.ndarray, Scales]]) -> Entries:
    """The entries of all rows, `resolved` one after the other, in their slots.

    Raises:
      ValueError: see `raw_strength`.
    """
    longest = max((len(row) for row in rows), default=0)
    ranges = max((len(parse_positions(entry.positions)) for row in rows for entry in row), default=1)
    data = _empty(len(rows), longest, resolved[0][0].size if resolved else 0, ranges)
    left = iter(resolved)
    for r, row in enumerate(rows):
        mine = [next(left) for _ in row]
        for slot, given in enumerate(sorted(range(len(row)), key=lambda i, row=row: row[i].key)):
            entry, (direction, scales) = row[given], mine[given]
            where = parse_positions(entry.positions)
            data["layer"][r, slot], data["mode"][r, slot] = entry.layer, MODES.index(entry.mode)
            data["direction"][r, slot] = direction / scales.norm if entry.mode == "project" else direction
            data["feature"][r, slot] = -1 if entry.feature is None else entry.feature
            data["strength"][r, slot] = raw_strength(entry, scales)
            data["ranges"][r, slot, : len(where)] = where
            data["preserve"][r, slot], data["slot"][r, given] = entry.preserve_norm, slot
    return Entries(**{name: jnp.asarray(value) for name, value in data.items()})


def _empty(rows: int, longest: int, width: int, ranges: int) -> dict[str, np.ndarray]:
    shape, ranges = (rows, longest), max(_RANGES, 1 << (ranges - 1).bit_length())
    return {
        "layer": np.full(shape, -1, np.int32),
        "mode": np.zeros(shape, np.int32),
        "direction": np.zeros((*shape, width), np.float32),
        "feature": np.full(shape, -1, np.int32),
        "strength": np.zeros(shape, np.float32),
        "ranges": np.zeros((*shape, ranges, 3), np.int32),
        "preserve": np.zeros(shape, bool),
        "slot": np.tile(np.arange(longest, dtype=np.int32), (rows, 1)),
    }
