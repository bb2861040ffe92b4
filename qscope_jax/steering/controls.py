"""Does a recipe work, is it the feature, and does the model still write: what a claim about steering is held against.

| control   | the recipe, but                                                              |
| unsteered | nothing                                                                      |
| identity  | with a strength that changes nothing: must equal unsteered token for token   |
| random    | along the directions of random features, every token's change as long        |
| flipped   | with the opposite sign                                                       |
| prompt    | on the prompt's tokens alone                                                 |
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from qscope_jax.sae.model import Sae
from qscope_jax.steering.recipe import Steer
from qscope_jax.steering.slots import resolve
from qscope_jax.steering.units import Scales, Stats, raw_strength

CONTROLS = ("unsteered", "identity", "random", "flipped", "prompt")

Recipe = Sequence[Steer]


def control_recipes(
    recipe: Recipe,
    saes: Mapping[int, Sae],
    *,
    stats: Stats | None = None,
    seed: int = 0,
    random: int = 10,
    exclude: Mapping[int, Collection[int]] | None = None,
) -> dict[str, list[list[Steer]]]:
    """The recipes of every control, by its name; of "random" there are several, to be averaged.

    Args:
      recipe: the entries under test.
      saes: per layer, as `steer` takes them.
      stats: for units other than raw, as `steer` takes them.
      seed: of the random features and directions.
      random: how many random recipes.
      exclude: per layer, features that are never drawn; for example those known to do what the recipe does. Features of
        the recipe never are.

    Raises:
      ValueError: an empty recipe, or one that `steer` would refuse; no features are left to draw from.
    """
    if not recipe:
        raise ValueError("controls of an empty recipe: there is nothing to compare with")
    resolved = resolve(recipe, saes, stats)
    raw = [
        entry if entry.strength is None else replace(entry, strength=raw_strength(entry, scales), units="raw")
        for entry, (_, scales) in zip(recipe, resolved, strict=True)
    ]
    rng = np.random.default_rng(seed)
    used = {layer: set((exclude or {}).get(layer, ())) for layer in {entry.layer for entry in recipe}}
    for entry in recipe:
        used[entry.layer] |= set() if entry.feature is None else {entry.feature}
    draw = lambda: _drawn(raw, [scales for _, scales in resolved], saes, used, rng)  # noqa: E731
    return {
        "unsteered": [[]],
        "identity": [[_identity(entry) for entry in raw]],
        "random": [draw() for _ in range(random)],
        "flipped": [[_flipped(entry) for entry in raw]],
        "prompt": [[replace(entry, positions="prompt") for entry in raw]],
    }


def _identity(entry: Steer) -> Steer:
    """Through the same computation without an effect."""
    if entry.mode in ("scale", "ablate"):
        return replace(entry, mode="scale", strength=1.0)
    if entry.mode in ("clamp", "min-clamp"):
        return replace(entry, mode="min-clamp", strength=0.0)
    return replace(entry, mode="add", strength=0.0)


def _flipped(entry: Steer) -> Steer:
    """The opposite change where there is one; "min-clamp" only ever raises, so its strength is added with a minus."""
    if entry.mode == "ablate":
        return replace(entry, mode="scale", strength=2.0)
    assert entry.strength is not None
    if entry.mode == "scale":
        return replace(entry, strength=2 - entry.strength)
    return replace(entry, mode="add" if entry.mode == "min-clamp" else entry.mode, strength=-entry.strength)


def _drawn(
    raw: Recipe,
    scales: Sequence[Scales],
    saes: Mapping[int, Sae],
    used: Mapping[int, set[int]],
    rng: np.random.Generator,
) -> list[Steer]:
    """The recipe along other features' directions, none twice, scaled so that every token's change stays as long."""
    taken, drawn = {layer: set(features) for layer, features in used.items()}, []
    for entry, scale in zip(raw, scales, strict=True):
        if entry.feature is None:
            direction = rng.standard_normal(len(entry.direction))
        else:
            free = np.setdiff1d(np.arange(saes[entry.layer].config.d_sae), list(taken[entry.layer]))
            if not free.size:
                raise ValueError(f"layer {entry.layer}: no feature is left to draw at random; exclude fewer")
            feature = int(rng.choice(free))
            taken[entry.layer].add(feature)
            direction = np.asarray(saes[entry.layer].params.w_dec[feature], np.float64)
        drawn.append(replace(entry, direction=direction * (scale.norm / np.linalg.norm(direction))))
    return drawn
