"""Strengths in the units people compare: raw, multiples of a feature's maximum, multiples of the median norm.

raw s = strength x max(a_i)   (xmax),        raw s = strength x median|h| / |d_i|   (xnorm)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from qscope_jax.sae.model import Sae
from qscope_jax.sae.quality import SINK_FACTOR
from qscope_jax.steering.recipe import Steer, checked_number

_HOW = (
    "build statistics with `qscope features build` and give them (stats=load_statistics(FOLDER), "
    "SAEModel.from_pretrained(..., statistics=FOLDER), --statistics FOLDER), or use units='raw'"
)


class LayerStats(Protocol):
    """What is asked of a layer's statistics: activations' maxima [f] (sinks excluded) and the median residual norm."""

    @property
    def max(self) -> Any: ...
    @property
    def median_norm(self) -> Any: ...


Stats = Mapping[int, LayerStats]


class Scales(NamedTuple):
    """What one entry's units are multiples of; None where it is not known."""

    norm: float  # |d_i|
    maximum: float | None  # the feature's largest activation
    median: float | None  # the layer's median residual norm


def scales_of(entry: Steer, norm: float, sae: Sae | None, stats: Stats | None) -> Scales:
    """What is known of an entry's layer; an SAE's sink threshold is 10x the median norm."""
    layer = None if stats is None else stats.get(entry.layer)
    maximum = None
    if layer is not None and entry.feature is not None:
        maxima = layer.max
        if np.ndim(maxima) != 1 or (sae is not None and len(maxima) != sae.config.d_sae):
            raise ValueError(
                f"the statistics of layer {entry.layer} have maxima of shape {np.shape(maxima)}, the SAE has "
                f"{sae.config.d_sae if sae is not None else 'other'} features: they do not belong together"
            )
        maximum = float(maxima[entry.feature])
    if layer is not None:
        return Scales(norm, maximum, float(layer.median_norm))
    threshold = None if sae is None else sae.config.sink_threshold
    return Scales(norm, maximum, None if threshold is None else threshold / SINK_FACTOR)


def unit_of(entry: Steer, units: str, scales: Scales) -> float | None:
    """How much raw strength one of `units` is for this entry; None where that is not known, 0 for a silent feature."""
    along = scales.norm if entry.mode == "project" else 1.0  # its strength is a length, not a coefficient of d
    if units == "raw":
        return 1.0
    if units == "xmax":
        return None if scales.maximum is None else scales.maximum * along
    return None if scales.median is None else scales.median / scales.norm * along


def raw_strength(entry: Steer, scales: Scales) -> float:
    """The strength that the formulas of `qscope_jax.steering` take; 0 for "ablate", which has none.

    Raises:
      ValueError: what its units are multiples of is unknown, or 0, or not finite.
    """
    if entry.strength is None:
        return 0.0
    unit = unit_of(entry, entry.units, scales)
    where = f"layer {entry.layer}" + ("" if entry.feature is None else f", feature {entry.feature}")
    if unit is None:
        what = "the feature's maximum" if entry.units == "xmax" else "the layer's median residual norm"
        raise ValueError(f"{where}: units {entry.units!r} are multiples of {what}, which is unknown; {_HOW}")
    if not 0 < unit < np.inf:
        what = "the feature never fired on the text of the statistics" if entry.units == "xmax" else "no usable norm"
        raise ValueError(f"{where}: one {entry.units} is {unit} ({what}); use units='raw' or other statistics")
    return checked_number(f"{where}: strength {entry.strength} {entry.units}, in raw units,", entry.strength * unit)
