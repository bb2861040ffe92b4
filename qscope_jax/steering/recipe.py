"""One change to the residual stream, as data: checked when it is made, so that no wrong one ever reaches a model."""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from qscope_jax.steering.positions import parse_positions

Mode = Literal["add", "clamp", "min-clamp", "ablate", "scale", "project"]
Units = Literal["raw", "xmax", "xnorm"]
MODES: tuple[Mode, ...] = get_args(Mode)
UNITS: tuple[Units, ...] = get_args(Units)
READS = frozenset({"clamp", "min-clamp", "ablate", "scale"})  # modes that need the feature's activation
MAX_STRENGTH = 1e12  # squares of what lies beyond leave float32; residual norms are below 1e6


@dataclass(frozen=True, eq=False)
class Steer:
    """One feature, or one plain direction, to steer at the output of one layer.

    With both, what the feature's activation asks for is done along the other direction: a control of its own length.

    Attributes:
      layer: 0-based decoder layer whose output is changed, before the final norm (`model.layers.N`).
      feature: index of the SAE's latent; None for a plain direction.
      strength: in `units`; none for "ablate".
      mode: "add", "clamp", "min-clamp", "ablate", "scale" or "project" (see `qscope_jax.steering`).
      units: "raw": the coefficient of the direction as stored (for "project" the component along it). "xmax": multiples
        of the feature's largest activation on text. "xnorm": the change's length in multiples of the layer's median
        residual norm. For "clamp" and "min-clamp" they measure the activation to reach. "scale" is a pure factor.
      positions: "all", "prompt", "generated", "last" (token of the prompt), "5", "3-7" (both ends), or "0,2,5-8".
      preserve_norm: rescale every token that this changes to the norm it had, after all changes at its layer.
      direction: a vector [d], for "add" and "project" instead of a feature; kept in float32.

    Raises:
      ValueError: what was wrong, and what is accepted.
    """

    layer: int
    feature: int | None = None
    strength: float | None = None
    mode: Mode = "add"
    units: Units = "raw"
    positions: str = "all"
    preserve_norm: bool = False
    direction: Any = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("layer", _index("layer", self.layer))
        for name, value, accepted in (("mode", self.mode, MODES), ("units", self.units, UNITS)):
            if value not in accepted:
                raise ValueError(f"{name} = {value!r}; expected one of {', '.join(accepted)}")
        if self.feature is None and self.direction is None:
            raise ValueError("a Steer has a feature (the index of a latent) or a direction (a vector): give one")
        if self.feature is not None:
            put("feature", _index("feature", self.feature))
        if self.direction is not None:
            put("direction", _vector(self.direction))
            self._check_direction()
        put("strength", self._checked_strength())
        if not isinstance(self.preserve_norm, bool):
            raise ValueError(f"preserve_norm = {self.preserve_norm!r}; expected True or False")
        parse_positions(self.positions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steer) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    @property
    def hook(self) -> str:
        """The module whose output is changed, as Hugging Face's models name it."""
        return f"model.layers.{self.layer}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two entries of a row share; also the order in which their changes are summed."""
        data = b"" if self.direction is None else self.direction.tobytes()
        return self.layer, -1 if self.feature is None else self.feature, MODES.index(self.mode), data

    def _all(self) -> tuple[Any, ...]:
        return (*self.key, self.strength, self.units, self.positions, self.preserve_norm)

    def _checked_strength(self) -> float | None:
        if self.mode == "ablate":
            if self.strength is not None or self.units != "raw":
                raise ValueError("mode 'ablate' takes the feature away and has no strength or units; leave them out")
            return None
        if self.mode == "scale" and self.units != "raw":
            raise ValueError(
                f"mode 'scale' multiplies the activation and has no units, found {self.units!r}; use 'raw'"
            )
        if self.strength is None:
            raise ValueError(f"mode {self.mode!r} needs a strength")
        try:
            strength = math.nan if isinstance(self.strength, bool) else float(self.strength)
        except (TypeError, ValueError):
            raise ValueError(f"strength = {self.strength!r}; expected a number") from None
        return checked_number("strength", strength)

    def _check_direction(self) -> None:
        if self.mode in READS and self.feature is None:
            raise ValueError(f"mode {self.mode!r} reads the activation of a feature; a plain direction has none")
        if self.units == "xmax" and self.feature is None:
            raise ValueError("units 'xmax' are multiples of a feature's maximum; a plain direction takes raw or xnorm")


def checked_number(name: str, value: float) -> float:
    """Refuses NaN, infinities and numbers that no residual stream holds.

    Raises:
      ValueError: the number and the bound.
    """
    if not math.isfinite(value) or abs(value) > MAX_STRENGTH:
        raise ValueError(f"{name} = {value}; expected a finite number within ±{MAX_STRENGTH:.0e}")
    return value


def as_rows(recipes: Sequence[Steer] | Sequence[Sequence[Steer]]) -> list[list[Steer]]:
    """The rows of recipes: one that all rows of a batch share, or one for each.

    Raises:
      TypeError: neither entries nor sequences of entries.
      ValueError: an entry twice in one row.
    """
    if isinstance(recipes, Steer) or not isinstance(recipes, Iterable):
        raise TypeError(f"recipes = {recipes!r}; expected a list of Steer, or one such list per row of the batch")
    listed: list[Any] = list(recipes)
    shared = all(isinstance(entry, Steer) for entry in listed)
    if not shared and not all(isinstance(row, Sequence) and not isinstance(row, str) for row in listed):
        raise TypeError("recipes mix entries and rows; expected a list of Steer, or one such list per row of the batch")
    for number, row in enumerate([listed] if shared else listed):
        _check_row(row, "" if shared else f" in row {number}")
    return [listed] if shared else [list(row) for row in listed]


def _check_row(row: Sequence[Any], where: str) -> None:
    seen = set()
    for entry in row:
        if not isinstance(entry, Steer):
            raise TypeError(f"{entry!r}{where} is no Steer")
        if entry.key in seen:
            what = "the same direction" if entry.feature is None else f"feature {entry.feature}"
            raise ValueError(f"{what} is steered twice at layer {entry.layer} with mode {entry.mode!r}{where}")
        seen.add(entry.key)


def _index(name: str, value: Any) -> int:
    try:
        number = -1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**31:
        raise ValueError(f"{name} = {value!r}; expected a whole number, counted from 0")
    return number


def _vector(value: Any) -> np.ndarray:
    vector = np.array(value, np.float32)
    if vector.ndim != 1 or not vector.size:
        raise ValueError(f"direction has shape {vector.shape}; expected [d], the width of the residual stream")
    if not np.isfinite(vector).all() or not vector.any() or np.abs(vector).max() > MAX_STRENGTH:
        raise ValueError("direction is zero, or not finite: there is nothing to steer along")
    vector.flags.writeable = False
    return vector
