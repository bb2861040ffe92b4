"""Recipes as a tap: everything about them is data, so that no strength, feature, layer, mode or position recompiles."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.mesh import to_host
from qscope_jax.sae.model import Sae, activations_of, without_provenance
from qscope_jax.steering.recipe import MODES, READS, Steer, as_rows
from qscope_jax.steering.slots import Entries, check_layers, fill_slots, resolve
from qscope_jax.steering.units import Stats
from qscope_jax.taps import Tap, TapContext


class Shared(NamedTuple):
    """What every layer sees: the entries, and the SAEs of the layers where an activation is read, ascending."""

    entries: Entries
    saes: tuple[Sae, ...]


class PerLayer(NamedTuple):
    """Per layer: its index, whether any entry works there, and which of the SAEs it reads (-1: none)."""

    layer: Int[Array, "l"]
    active: Bool[Array, "l"]
    sae: Int[Array, "l"]


class Applied(NamedTuple):
    """How many real tokens of a row an entry's rule chose at its layer, and how many of those it changed.

    The tap's output at every layer, where entries of other layers count 0; entries stand in the order given.
    """

    selected: Int[Array, "*n b e"]
    changed: Int[Array, "*n b e"]


def steer(
    recipes: Sequence[Steer] | Sequence[Sequence[Steer]],
    saes: Mapping[int, Sae],
    *,
    stats: Stats | None = None,
    num_layers: int | None = None,
) -> Tap:
    """The tap that applies recipes; its outputs are `Applied` per layer.

    All changes at a layer are computed from the same residual stream, in float32, and added at once. Tokens without a
    change keep every bit. Another strength, feature, layer, mode or rule never recompiles; another number of entries
    (of the longest row) or of layers at which activations are read does, and a rule of more than 8 ranges.

    Args:
      recipes: entries for all rows of a batch, or one sequence of them per row (a sweep is one call).
      saes: {layer: Sae} with at least the layers of features; the largest is taken for the last of the model.
      stats: {layer: statistics} with `max` [f] and `median_norm`, for units other than raw. Without them "xnorm" reads
        the SAE's sink threshold, which is 10x the median norm.
      num_layers: of the model, where `saes` do not reach its last layer.

    Raises:
      TypeError: recipes of another kind.
      ValueError: a layer that the model or `saes` do not have, a feature out of range, an entry twice, a direction of
        zero or of another width, or units that nothing is known for; named.
    """
    rows = as_rows(recipes)
    depth = num_layers if num_layers is not None else max(saes, default=-1) + 1
    entries = [entry for row in rows for entry in row]
    check_layers(entries, saes, depth)
    resolved = resolve(entries, saes, stats)
    read = sorted({entry.layer for entry in entries if entry.mode in READS})
    layers = np.arange(depth)
    active, sae = np.isin(layers, [entry.layer for entry in entries]), np.full(depth, -1)
    sae[read] = np.arange(len(read))
    bare = tuple(without_provenance(saes[n]) for n in read)
    per_layer = PerLayer(jnp.asarray(layers, jnp.int32), jnp.asarray(active), jnp.asarray(sae, jnp.int32))
    return Tap(apply_recipes, per_layer, Shared(fill_slots(rows, resolved), bare))


def apply_recipes(
    h: Float[Array, "b t d"], at: PerLayer, shared: Shared, ctx: TapContext
) -> tuple[Float[Array, "b t d"], Applied]:
    """The tap's function: changes one layer's output where an entry works there, and does nothing elsewhere.

    Raises:
      ValueError: the entries are for other rows, or for a residual stream of another width.
    """
    rows, slots, width = shared.entries.direction.shape
    if rows not in (1, h.shape[0]):
        raise ValueError(f"recipes for {rows} rows, but the batch has {h.shape[0]}; give one for all, or one per row")
    none = jnp.zeros((h.shape[0], slots), jnp.int32)
    if not slots:
        return h, Applied(none, none)
    if width != h.shape[-1]:
        raise ValueError(
            f"recipes steer along directions of {width}, the model's residual stream has {h.shape[-1]}: the SAE does "
            "not belong to this model"
        )
    change = lambda h: _change(h, at, shared, ctx)  # noqa: E731
    return jax.lax.cond(at.active, change, lambda h: (h, Applied(none, none)), h)


def count_applied(*outputs: Applied) -> Applied:
    """Totals [b, e] over layers and calls, for example of `Taps.prompt` and `Taps.generated`.

    Where processes hold different rows, all of them call this.
    """

    def total(name: str):
        counts = [to_host(getattr(out, name)) for out in outputs]
        return np.sum([count.sum(axis=tuple(range(count.ndim - 2))) for count in counts], axis=0)

    return Applied(total("selected"), total("changed"))


def _change(h, at: PerLayer, shared: Shared, ctx: TapContext):
    entries = shared.entries
    x = h.astype(jnp.float32)
    here = (entries.layer == at.layer)[:, None]
    chosen = here & ctx.mask[..., None] & _in_ranges(entries.ranges, ctx)
    coefficients = jnp.where(chosen, _coefficients(x, h, at, shared), 0.0)
    delta = _contract("bte,{}ed->btd", coefficients, entries.direction)
    steered, preserved = x + delta, jnp.any((coefficients != 0) & entries.preserve[:, None], axis=-1, keepdims=True)
    before, after = (jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (x, steered))
    steered *= jnp.where(preserved & (after > 0), before / after, 1.0)
    h = jnp.where(jnp.any(delta != 0, axis=-1, keepdims=True), steered.astype(h.dtype), h)
    order = jnp.broadcast_to(entries.slot, (h.shape[0], entries.slot.shape[1]))
    count = lambda which: jnp.take_along_axis(jnp.sum(which, axis=1, dtype=jnp.int32), order, axis=1)  # noqa: E731
    return h, Applied(count(chosen), count(coefficients != 0))


def _coefficients(x, h, at: PerLayer, shared: Shared) -> Float[Array, "b t e"]:
    """What every entry multiplies its direction with, by the table of `qscope_jax.steering`."""
    entries = shared.entries
    a = _activations(h, at.sae, shared)
    s, mode = entries.strength[:, None], entries.mode[:, None]
    by_mode = {
        "add": s,
        "clamp": s - a,
        "min-clamp": jnp.maximum(s - a, 0),
        "ablate": -a,
        "scale": (s - 1) * a,
        "project": s - _contract("btd,{}ed->bte", x, entries.direction),
    }
    return jnp.select([mode == i for i in range(len(MODES))], [by_mode[name] for name in MODES])


def _activations(h, index, shared: Shared) -> Float[Array, "b t e"]:
    """The entries' feature activations; 0 where the SAE's k largest do not hold them, or no SAE is read."""
    feature = shared.entries.feature[:, None]
    none = lambda: jnp.zeros((*h.shape[:2], feature.shape[-1]), jnp.float32)  # noqa: E731
    # One branch per SAE: picked from a stack of encoders, one would be a copy of it.
    branches = [none, *((lambda sae=sae: activations_of(sae, h, feature)) for sae in shared.saes)]
    return jax.lax.switch(index + 1, branches)


def _contract(formula: str, left, right):
    """An einsum of per-row and per-entry data, where the entries [r, e, d] may be those of all rows."""
    shared = right.shape[0] == 1
    return jnp.einsum(formula.format("" if shared else "b"), left, right[0] if shared else right, precision="highest")


def _in_ranges(ranges, ctx: TapContext) -> Bool[Array, "b t e"]:
    low, high, relative = (ranges[:, None, :, :, i] for i in range(3))
    position, from_end = ctx.positions[..., None, None], (ctx.positions - ctx.prompt_lengths)[..., None, None]
    position = jnp.where(relative == 1, from_end, position)
    return jnp.any((low <= position) & (position < high), axis=-1)
